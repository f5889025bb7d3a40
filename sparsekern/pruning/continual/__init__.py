"""One data set after another: what is learned of each adds up, and no data are kept."""
