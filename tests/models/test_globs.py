"""Names and globs that choose among linears."""

import pytest

from sparsekern.models.globs import as_globs, check_matches, first_match, matches


@pytest.mark.parametrize(
    ("given", "expected"), [(None, None), ("a.*", ["a.*"]), (("a", "b"), ["a", "b"]), ({"a": 1}, ["a"]), ([], [])]
)
def test_names_become_a_list(given, expected):
    assert as_globs("include", given) == expected


@pytest.mark.parametrize("given", [3, [None], [b"a"], ["a", 3], True])
def test_what_is_no_name_is_refused(given):
    with pytest.raises(TypeError, match="include: expected names or globs, got"):
        as_globs("include", given)


def test_each_glob_must_match_something():
    check_matches("exclude", ["*.q", "a.k"], ["a.q", "a.k"])
    check_matches("exclude", None, [])
    with pytest.raises(ValueError, match=r"exclude: '\*.v' matches no linear of the model \(they are named like 'a.q'\)"):
        check_matches("exclude", ["*.q", "*.v"], ["a.q"])
    with pytest.raises(ValueError, match=r"exclude: '\*' matches no linear of the model$"):
        check_matches("exclude", ["*"], [])


def test_case_counts_and_the_first_match_wins():
    assert matches("a.q", ["*.Q", "*.q"]) and not matches("a.q", ["*.Q"]) and not matches("a.q", None)
    assert first_match("a.q", {"*.k": 1, "a.*": 2, "*.q": 3}, 0) == 2
    assert first_match("b.v", {"*.k": 1, "*": None}, 0) is None and first_match("b.v", {"*.k": 1}, 0) == 0
