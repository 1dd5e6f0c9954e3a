from __future__ import annotations

import csv
import json
import re

import pytest

from ovbench.errors import UsageError
from ovbench.results.measured import metric
from ovbench.tables import published
from ovbench.tables.method_defaults import changed_options
from ovbench.tables.paper import arrange


def test_our_copy_is_the_shared_file_plus_listed_corrections(shared):
    ours = (published.published_dir() / "published.csv").read_bytes()
    theirs = (shared / "published" / "published.csv").read_bytes()
    readme = (published.published_dir() / "README.md").read_text(encoding="utf-8")
    assert ours == theirs or "So far there is none." not in readme


def test_every_line_is_a_number_with_a_known_metric():
    entries = published.numbers()
    assert len(entries) > 1300
    for entry in entries:
        float(entry.value)
        assert metric(entry.metric).label and entry.unit and entry.dataset
    assert len({(*tuple(vars(entry).values())[:9], entry.setting) for entry in entries}) == len(entries)


def test_printed_means_are_the_means_of_the_numbers_beside_them_but_for_two():
    rows: dict[tuple[str, ...], dict[str, float]] = {}
    for entry in published.numbers():
        if entry.metric == "mIoU":
            key = (entry.source, entry.table, entry.row, entry.variant, entry.backbone, entry.train_data)
            rows.setdefault(key, {})[entry.dataset] = float(entry.value)
    wrong = []
    for key, values in rows.items():
        for name in [name for name in values if name.startswith("mean")]:
            members = [value for dataset, value in values.items() if not dataset.startswith("mean")]
            assert len(members) == int(name.removeprefix("mean"))
            # half a digit of the printed mean, and as much of the members'
            if abs(sum(members) / len(members) - values[name]) > 0.1:
                wrong.append(key[:3])
    assert wrong == [("direct-seg", "1", "CLIPtrase"), ("thesis-lsmseg", "5.10", "CLIP _qv")]


def test_papers_and_tables_have_the_ids_of_the_file():
    assert published.papers() == ["direct-seg", "fisa", "scn", "thesis-caa", "thesis-ecac", "thesis-lsmseg"]
    assert published.tables("direct-seg") == [
        "1", "2", "3", "4", "complexity", "complexity-stages", "vfm", "versatility",
    ]  # fmt: skip
    assert "3a" in published.tables("fisa") and published.tables("scn") == []
    with pytest.raises(UsageError, match=r"Unknown paper 'fissa'\. Did you mean: fisa"):
        published.tables("fissa")
    with pytest.raises(UsageError, match=r"Unknown table of thesis-caa '3\.9'"):
        published.table_numbers("thesis-caa", "3.9")


@pytest.mark.parametrize("paper", published.papers())
def test_every_table_can_be_arranged_without_a_run(paper):
    for table in published.tables(paper):
        (section,) = arrange(paper, table, []).sections
        printed = [cell.published for row in section.rows for cell in row.cells if cell.published is not None]
        assert sorted(printed) == sorted(entry.value for entry in published.table_numbers(paper, table))
        assert all(cell.value is None for row in section.rows for cell in row.cells)
        assert all(row.settings[section.settings.index("state")] for row in section.rows)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ViT-B/16", "ViT-B-16"),
        ("ViT-B/16", "ViT-B-16-quickgelu"),
        ("ViT-L/14-336", "ViT-L-14-336-quickgelu"),
        ("ResNet101", "ResNet-101"),
        ("Swin-Large", "swin-l"),
        ("ViT-Base", "vit_b"),
        ("ResNet-50", "resnet50-v1c"),
        ("ResNet101", "resnet101-v1c"),
        ("ViT-Large", "vit-l"),
        ("MSCAN-L", "mscan-l"),
        ("ViT-B/16", "openai-format-ViT-12x768-16"),
    ],
)
def test_backbones_are_recognised(one, other):
    assert published.plain_arch(one) == published.plain_arch(other)


def test_backbones_are_told_apart():
    names = ["ViT-B/16", "ViT-B/32", "ViT-L/14", "ViT-L/14-336", "ResNet-50", "ResNet-101", "Swin-Base", "Swin-Large"]
    names += ["ViT-Large", "ViT-Base", "MSCAN-L", "mscan-b", "InternImage-B", "openai-format-ViT-12x768-32"]
    assert len({published.plain_arch(name) for name in names}) == len(names)


def _wanted(source, table, row, metric="mIoU"):
    entries = [entry for entry in published.table_numbers(source, table) if (entry.row, entry.metric) == (row, metric)]
    return published.wanted(entries[0])


def test_rows_of_the_thesis_name_our_methods():
    assert _wanted("thesis-caa", "3.5", "PSPNet", "params").method == "psp"
    assert _wanted("thesis-caa", "3.5", "PSPNet+CAA", "params").method == "caa-psp"
    assert _wanted("thesis-ecac", "4.1", "DeeplabV3plus + ECAC").method == "ecac-deeplabv3plus"
    assert _wanted("thesis-ecac", "4.6", "FCN+MCIBI", "params").method == ""
    head = _wanted("thesis-caa", "3.5", "PSPNet", "flops")
    assert head.require["part"] == "decode_head" and head.prefer == {"count": "modules"}
    assert not head.unknown


def test_an_ablation_without_a_rule_fits_nothing():
    seve = _wanted("fisa", "3a", "+ SEVE", "PQ")
    assert seve.require["method_options.training_overrides"] == ["iters=10000", "policy=seve"] and not seve.unknown
    assert "not stated" in _wanted("thesis-lsmseg", "5.9", "GPT-4").unknown
    assert _wanted("direct-seg", "versatility", "SC-CLIP w/ O.P.").require == {"method_options.base": "sc-clip"}


def test_encoders_of_the_thesis_are_ours():
    """Every printed backbone beside a closed-set method of ours is an encoder, but for the one that we lack."""
    from ovbench.networks.encoders import encoder_names

    ours = {published.plain_arch(name) for name in encoder_names()}
    printed = {
        entry.backbone
        for entry in published.numbers()
        if entry.source in ("thesis-caa", "thesis-ecac") and published.wanted(entry).method
    }
    assert {name for name in printed if published.plain_arch(name) not in ours} == {"InternImage-B"}


def test_ablation_rows_are_the_settings_that_are_built():
    """The rules say what the networks' own test builds for each row of Tables 3.2 to 4.5."""
    pytest.importorskip("torch")
    from test_closed_set_networks import ROWS, _weights_row

    from ovbench.registry import closed_set_class

    for table in ("3.2", "3.3", "3.4", "4.2", "4.3", "4.4", "4.5"):
        paper = "thesis-caa" if table < "4" else "thesis-ecac"
        for entry in published.table_numbers(paper, table):
            want = published.wanted(entry)
            method, options = _weights_row(entry.row) if table == "4.3" else ROWS[table, entry.row]
            given = {
                name.removeprefix("method_options."): value
                for name, value in want.require.items()
                if name.startswith("method_options.")
            }
            cls = closed_set_class(method)
            assert want.method == method and not want.unknown
            assert cls.configure(given) == cls.configure(options), (table, entry.row)


def test_rules_name_methods_options_presets_and_fields_that_there_are():
    from dataclasses import fields

    from ovbench.registry import closed_set_class, method_class, method_info
    from ovbench.spec import Protocol, protocol_names
    from ovbench.tables.match import TRAINED_ON, TRAINING_OVERRIDES

    for entry in published.numbers():
        want = published.wanted(entry)
        if not entry.source.startswith("thesis") or not want.method:
            continue
        assert want.protocol in ("", *protocol_names())
        closed = method_info(want.method).track == "closed-set"  # an unknown method is an error
        cls = closed_set_class(want.method) if closed else method_class(want.method)
        known = {f"method_options.{name}" for name in (TRAINED_ON, TRAINING_OVERRIDES)}
        known |= {f"method_options.{field.name}" for field in fields(cls.Config)}
        known |= {f"protocol.{name}" for name in Protocol.model_fields} | {"part", "features", "classes"}
        assert {*want.require, *want.assume} <= known, entry


def test_every_rule_is_for_some_number():
    rules = json.loads((published.published_dir() / "rules.json").read_text(encoding="utf-8"))
    for rule in rules["rules"]:
        assert set(rule) <= {
            "where", "method", "arch", "datasets", "require", "prefer", "assume", "protocol", "machine"
        }, rule  # fmt: skip
        assert any(published._matches(rule["where"], entry) for entry in published.numbers()), rule


def test_the_readme_names_every_column():
    folder = published.published_dir()
    with (folder / "published.csv").open(encoding="utf-8", newline="") as file:
        columns = next(csv.reader(file))
    readme = (folder / "README.md").read_text(encoding="utf-8")
    described = set(
        re.findall(r"`([\w-]+)`", "\n".join(line.split("|")[1] for line in readme.splitlines() if "|" in line))
    )
    assert set(columns) <= described


def test_option_defaults_are_read_from_the_source():
    from ovbench.registry import method_class, method_names

    for name in method_names():  # the real classes, which load torch, say what the text must say
        method = method_class(name)
        from dataclasses import asdict

        own = json.loads(json.dumps(asdict(method.configure({}))))
        assert changed_options(name, own, None) == {}, name
    assert changed_options("sc-clip", {"beta": 0.5, "pre": 8}, None) == {"beta": 0.5}
    assert changed_options("proxyclip", {"attention_weights": "dino.pth"}, None) == {}  # a place, not a choice
    assert changed_options("no-such-method", {"beta": 0.5}, None) is None
