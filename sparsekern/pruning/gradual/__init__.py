"""The whole model in steps: prune a little, train, prune more."""
