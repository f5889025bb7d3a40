"""The README's picture shows what the committed table holds."""

from bench import overview


def test_the_picture_is_that_of_the_table():
    assert overview.PICTURE.read_text(encoding="utf-8") == overview.picture()


def test_every_row_is_named_with_what_it_is_compared_with():
    assert all(", vs " in label for label in overview.SHOWN.values())
