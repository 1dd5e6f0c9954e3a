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
    """The shared numbers with the shared corrections, those that were missing, and the variants that the README lists."""

    def read(name):
        with (shared / "published" / name).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    numbers = read("published.csv")
    for change in read("corrections.csv"):
        where, _, what = change["row"].partition(": ")
        row = numbers[int(where.removeprefix("line ")) - 2]  # the first line is the heading
        assert [row[name] for name in ("source", "table", "row", "dataset", "metric")] == [
            part for index, part in enumerate(what.split("|")) if index != 3
        ]
        for text, check in ((change["old"], True), (change["new"], False)):
            for pair in text.split("; "):
                name, _, value = pair.partition("=")
                assert not check or row[name] == value
                row[name] = value
    numbers += read("missing.csv")
    variants = {
        ("fisa", "1", "SED"): "fast inference (8 classes kept)",
        ("thesis-lsmseg", "5.1", "SED"): "fast inference (8 classes kept)",
        ("direct-seg", "1", "CLIPtrase"): "scored on centre crops",
        ("fisa", "1", "MaskCLIP"): "trained (relative mask attention)",
        ("thesis-lsmseg", "5.1", "MaskCLIP"): "trained (relative mask attention)",
    }
    readme = (published.published_dir() / "README.md").read_text(encoding="utf-8")
    for row in numbers:
        row["variant"] = row["variant"] or variants.get((row["source"], row["table"], row["row"]), "")
    assert all(text in readme for text in variants.values())
    ours = [vars(entry) for entry in published.numbers() if not entry.origin]
    assert sorted(tuple(row.values()) for row in numbers) == sorted(tuple(row.values())[:-1] for row in ours)
    rivals = (published.published_dir() / "rivals.csv").read_bytes()
    assert rivals == (shared / "published" / "rivals.csv").read_bytes()


def test_every_line_is_a_number_with_a_known_metric():
    entries = published.numbers()
    assert len(entries) == 1597 + 936
    for entry in entries:
        float(entry.value)
        assert metric(entry.metric).label and (entry.unit or entry.metric == "referring") and entry.dataset
    assert len({(*tuple(vars(entry).values())[:9], entry.setting, entry.origin) for entry in entries}) == len(entries)


def test_printed_means_are_the_means_of_the_numbers_beside_them_but_for_two():
    rows: dict[tuple[str, ...], dict[str, float]] = {}
    for entry in published.numbers():
        if entry.metric == "mIoU" and not entry.origin:
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
    assert published.papers()[:6] == ["direct-seg", "fisa", "scn", "thesis-caa", "thesis-ecac", "thesis-lsmseg"]
    rivals = {entry.source for entry in published.numbers() if entry.origin}
    assert set(published.papers()[6:]) == rivals and len(rivals) == 17
    assert published.tables("direct-seg") == [
        "1", "2", "3", "4", "complexity", "complexity-stages", "vfm", "versatility",
    ]  # fmt: skip
    assert "3a" in published.tables("fisa") and published.tables("scn") == []
    with pytest.raises(UsageError, match=r"Unknown paper 'fissa'\. Did you mean: fisa"):
        published.tables("fissa")
    with pytest.raises(UsageError, match=r"Unknown table of thesis-caa '3\.9'"):
        published.table_numbers("thesis-caa", "3.9")


@pytest.mark.parametrize("paper", [*published.papers(), *published.methods()])
def test_every_table_can_be_arranged_without_a_run(paper):
    for table in published.tables(paper):
        sections = arrange(paper, table, []).sections
        rows = [row for section in sections for row in section.rows]
        printed = [cell.published for row in rows for cell in row.cells if cell.published is not None]
        assert sorted(printed) == sorted(entry.value for entry in published.table_numbers(paper, table))
        assert all(cell.value is None for row in rows for cell in row.cells)
        assert all(row.settings[section.settings.index("state")] for section in sections for row in section.rows)


def test_numbers_of_different_printers_share_no_row():
    """NACLIP's repository prints 64.07, with PAMR; two others print 58.9 for it: three rows, each with its name."""
    (section,) = arrange("naclip", published.BY_METHOD, []).sections
    first = {}
    for row in section.rows:
        named = dict(zip(section.settings, row.settings, strict=True))
        cells = {column.dataset: cell.published for column, cell in zip(section.columns, row.cells, strict=True)}
        if named["backbone"] == "ViT-B/16" and cells.get("voc21"):
            first[named["printed by"]] = cells["voc21"]
    assert (
        first["naclip-repo, README"] == "64.07"
        and first["direct-seg, 1"] == first["trident-repo, main results (picture)"]
    )
    assert first["direct-seg, 1"] == "58.9"
    assert any("sinahmr/NACLIP" in note for note in section.notes) and any("PAMR on" in note for note in section.notes)
    with_pamr = _wanted("naclip-repo", "README", "NACLIP")
    assert with_pamr.require == {"protocol.pamr": 10} and _wanted("direct-seg", "1", "NACLIP").require == {}
    assert {entry.value for entry in published.accuracy_of("naclip", "ViT-B-16", "voc21")} == {"58.9"}


def test_what_compares_with_nothing_says_why():
    for paper, table, row, state in (
        ("fisa", "3f", "with FISA", "out of scope"),
        ("direct-seg", "1", "CLIPtrase", "compares with nothing"),
        ("cliptrase-repo", "README", "CLIPtrase", "compares with nothing"),
        ("fisa", "1", "FC-CLIP", "weights not read"),
        ("direct-seg", "3", "attention blocks (II)", "settings not stated"),
        ("thesis-ecac", "4.8", "Ratio", "of the data"),
    ):
        section = arrange(paper, table, []).sections[0]
        settings = next(found.settings for found in section.rows if found.settings[0] == row)
        assert settings[section.settings.index("state")] == state
        assert any("No run of ours stands beside" in note for note in section.notes)


def test_fisas_second_table_is_of_one_model():
    """28.1 and 36.8 are those of ViT-L/14-336 trained on COCO panoptic: no other run of FISA stands beside them."""
    for name in ("PQ", "mIoU"):
        want = _wanted("fisa", "2", "FISA", name)
        assert want.arch == ("vitl14336",) and want.assume == {"method_options.trained_on": "coco_panoptic"}
    assert _wanted("thesis-lsmseg", "5.1", "SED").method == "" and _wanted("thesis-caa", "3.1", "PCAA").method == ""
    own = [e for e in published.table_numbers("thesis-lsmseg", "5.1") if (e.row, e.dataset) == ("FC-CLIP", "voc20b")]
    assert [(entry.value, entry.setting) for entry in own] == [("81.8", "FC-CLIP's own PAS-21")]


def test_classes_of_printed_tables_are_classes_of_the_benchmark():
    from ovbench import benchmarks
    from ovbench.results.measured import CLASS, _plain

    classed = [entry for entry in published.numbers() if entry.metric.startswith(CLASS)]
    assert len(classed) == 60 + 42
    for entry in classed:
        assert _plain(entry.metric.removeprefix(CLASS)) in map(_plain, benchmarks.get(entry.dataset).class_names), entry


def test_a_group_is_the_mean_of_the_classes_beside_it(make_record):
    from ovbench.results.measured import of_record
    from ovbench.results.record import metrics_from_areas

    entries = [
        e for e in published.table_numbers("thesis-lsmseg", "5.2") if (e.row, e.variant) == ("LMSeg", "unseen classes")
    ]
    (group,) = [entry for entry in entries if entry.metric == "mIoU:group"]
    want = published.wanted(group)
    assert len(want.classes) == 6 and "background" in want.classes
    printed = [float(entry.value) for entry in entries if entry is not group]
    assert sum(printed) / 6 == pytest.approx(float(group.value), abs=0.1)
    names = ["background", "aeroplane", "dining table", "motorbike", "sofa", "tv monitor", "cat"]
    inter = [10, 20, 30, 40, 50, 60, 99]
    metrics = metrics_from_areas(
        names, inter, [100] * 7, [50 + n // 2 for n in inter], [50 + n - n // 2 for n in inter], images=1
    )
    spec = {"arch": "ViT-L-14-336", "weights": "model.safetensors"}
    record = make_record(method="lsmseg", dataset="voc20b", spec=spec, metrics=metrics)
    table = arrange("thesis-lsmseg", "5.2", [of_record(record)])
    seen, unseen = table.sections
    values = {c.figure: cell.value for c, cell in zip(unseen.columns, unseen.rows[1].cells, strict=True)}
    assert values["iou:diningtable"] == 30.0 and values["mIoU:group"] == 35.0
    # the group of which a class is missing has no mean, the class that is there its own
    values = {c.figure: cell.value for c, cell in zip(seen.columns, seen.rows[1].cells, strict=True)}
    assert values["mIoU:group"] is None and values["iou:cat"] == 99.0 and values["iou:dog"] is None


def test_stored_tables_say_what_is_built():
    """Each is what its profiles give today: a method that is built since, or a corrected number, makes one stale."""
    from ovbench.results.profiles import load_all
    from ovbench.tables import render

    root = published.published_dir().parent
    if not (root / "tables").is_dir():
        pytest.skip("no checkout")
    profiles = load_all(root / "profiles", on_problem=lambda text: pytest.fail(text))
    found = [
        (paper, table, path)
        for paper in published.papers()
        for table in published.tables(paper)
        if (path := root / "tables" / f"{paper}-{table}.md").is_file()
    ]
    assert len(found) >= 6
    for paper, table, path in found:
        now = render.to_markdown(arrange(paper, table, profiles))
        assert path.read_text(encoding="utf-8") == now, (
            f"run 'python studies/paper_efficiency.py --tables-only': {path}"
        )


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
        if entry.source in ("thesis-caa", "thesis-ecac") and published.wanted(entry).method and entry.backbone
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
            "where", "method", "arch", "datasets", "require", "prefer", "assume", "protocol", "machine", "weights",
            "unknown", "state",
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
