"""Every code block of the README and of the documentation's pages runs, on small data and with small networks."""

from __future__ import annotations

import doctest
import importlib
import re
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from documented import LANGUAGES, PAGES, ROOT, Block, blocks, run_page

import mmer_fast
from mmer_fast import report
from mmer_fast.ablation import api as ablation
from mmer_fast.bench import commands as bench_commands
from mmer_fast.data import FORMATS, loading, make_dialogues, make_synthetic
from mmer_fast.data import commands as data_commands
from mmer_fast.report import analysis
from mmer_fast.training import api, settings
from mmer_fast.training import commands as training_commands

# Of a benchmark that measures nothing.
NO_BENCHMARK = {"created": "2025-01-01", "device": "cpu", "quick": True, "machine": {"gpu": "none"}, "rows": []}
SMALL = {"n_train": 12, "n_valid": 6, "n_test": 6, "max_length": 8}
SMALL_NETWORK = {
    "dim": 8,
    "ffn_dim": 8,
    "heads": 2,
    "unimodal_blocks": 1,
    "multimodal_blocks": 1,
    "decoder_blocks": 1,
    "padded_length": None,
}
# The files that the pages speak of as the reader's own.
FILES = {"features.npz": "npz", "unaligned_50.pkl": "mmsa", "train_valid_test.pt": "tailor"}
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
MAX_NOT_RUN = 3


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A directory with the reader's files, where the embedded data and every network that is trained are tiny.

    Only the command `report` draws: the reports at the end of each training take most of a test's time. Ablations plan
    and write, but start no processes. Benchmarks read their cases and measure nothing.
    """
    tiny = partial(make_synthetic, **SMALL)
    for name, format in FILES.items():
        FORMATS[format].write(tiny(), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "make_synthetic", tiny)
    monkeypatch.setattr(loading, "make_dialogues", partial(make_dialogues, **SMALL))
    monkeypatch.setattr(data_commands, "make_synthetic", lambda seed=0, **_: tiny(seed))
    for module in (api, training_commands):
        monkeypatch.setattr(module, "configure", shrunk)
    monkeypatch.setattr(report, "plot_curves", lambda history, path, **_: path.touch())
    monkeypatch.setattr(report, "write_report", lambda runs, path, **_: path.touch())
    monkeypatch.setattr(ablation, "train_all", lambda *_: {})
    monkeypatch.setattr(analysis, "measure_step", lambda *_: None)
    monkeypatch.setattr(bench_commands, "measure", lambda *_: NO_BENCHMARK)
    return tmp_path


def shrunk(*arguments):
    """What is asked for is checked as it stands; what is trained is small."""
    model, train = settings.configure(*arguments)
    names = {field.name for field in fields(model)}
    model = replace(model, **{name: size for name, size in SMALL_NETWORK.items() if name in names})
    return model, replace(train, epochs=min(train.epochs, 2), batch_size=8)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_block_runs(page, small):
    run_page(page)


WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "mmer_fast").rglob("*.py")
    if ">>>" in path.read_text()
)


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_of_docstrings_give_what_they_show(module):
    names = {name: getattr(mmer_fast, name) for name in mmer_fast.__all__} | {"torch": torch}
    result = doctest.testmod(importlib.import_module(module), extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0


def test_nearly_nothing_is_left_out():
    left_out = [block.place for page in PAGES for block in blocks(page) if block.reason]
    assert len(left_out) <= MAX_NOT_RUN, left_out


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_that_are_named_exist(page):
    named = re.findall(r"`((?:\.ci|benchmarks|csrc|docs|examples|kernels|mmer_fast|tests)/[\w./-]*)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists() and not name.endswith(".so")] == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)[^)\s]*\)", text)
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```python\nassert 1 == 2\n```", "AssertionError"),
        ("```python\nprint(3)\n```\n\n```output\n4\n```", "is not what is printed"),
        ("```sh\nmmer-fast train --no-such-option\n```", "ends with 2"),
        ("```sh\nmake no-such-target\n```", "does not know"),
        ('```sh\npip install ".[nothing]"\n```', "no extra"),
        ("```sh\nMMER_NOTHING=1 pip install .\n```", "nothing reads"),
        ("```sh\ntorchrun -m mmer_fast train --no-such-option\n```", "NoSuchOption"),
        ("```sh\npython -m benchmarks.systems.run nothing\n```", "SystemExit"),
        ("```sh\nrm -r everything\n```", "no rule"),
        ("```yaml\ntrain: {epoch: 3}\n```", "unknown field"),
        ('```python title="setup.py"\nfrom nowhere import nothing\n```', "is not in setup.py"),
        ("```\nwhat is this\n```", "a language other than"),
    ],
)
def test_a_block_that_is_wrong_is_found(text, complaint, small, monkeypatch, capsys):
    page = small / "page.md"
    page.write_text(text + "\n")
    monkeypatch.setattr(Block, "place", property(lambda block: f"page.md:{block.line}"))
    with pytest.raises(AssertionError, match=complaint):
        run_page(page)


def test_languages_are_those_of_the_pages():
    used = {block.language for page in PAGES for block in blocks(page) if block.excerpt_of is None}
    assert used <= set(LANGUAGES)
