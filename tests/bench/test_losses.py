from __future__ import annotations

from bench.methods import losses


def test_each_row_has_a_file_of_its_own_and_ours_are_folders():
    names = {row: losses.name_of(row) for row in losses.ROWS}
    assert len(set(names.values())) == len(losses.ROWS) == 8
    assert {row for row, name in names.items() if not name.endswith(".gguf")} == set(losses.OURS)
    assert not any(set(name) & set(" :,/") for name in names.values())


def test_the_section_says_what_4_bits_cost():
    figures = {"2:4, bf16, perplexity": 30.0, "2:4, bf16, tokens a second": 21.34, "2:4, 4 bits, perplexity": 31.0}
    text = losses.section(figures)
    assert "| 2:4, bf16 | not measured | not measured | 30.00 | 21.3 |" in text
    assert "\n4 bits add 0.033 to the log-perplexity of 2:4 (goal: at most 0.06)." in text
    assert "4 bits add" not in losses.section({})


def test_sides_are_timed_in_turns_after_a_round_that_warms_up(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(losses.sparsekern, "load", lambda path, device: path)
    monkeypatch.setattr(losses, "seconds_of_token", lambda path, tokens: calls.append(path.name) or float(len(calls)))
    monkeypatch.setattr(losses, "seconds_of_llama_cpp", lambda program, path, tokens, threads: calls.append(path.name) or 0.5)
    monkeypatch.setattr(losses, "program_of", lambda build: build / "llama-bench")
    paths = {row: tmp_path / losses.name_of(row) for row in (losses.DENSE, losses.Q4_0)}
    taken = losses.times(paths, tmp_path, 2)
    assert calls == ["dense-bf16", "2of4-4-bits-as-Q4_0.gguf"] * 3
    assert taken == {losses.DENSE: [3.0, 5.0], losses.Q4_0: [0.5, 0.5]}
    assert list(losses.times(paths, None, 1)) == [losses.DENSE]
