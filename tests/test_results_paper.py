"""A paper's table: which runs may stand beside which printed number, and what is said about them."""

from __future__ import annotations

import csv
import io
import json
from datetime import datetime, timezone

import pytest

from ovbench.errors import DataError
from ovbench.results import profiles
from ovbench.results.measured import of_record
from ovbench.tables import render, render_markup
from ovbench.tables.paper import RULE, arrange
from ovbench.tables.published import tables

EIGHT = ("voc21", "context60", "coco_object", "voc20", "context59", "coco_stuff", "cityscapes", "ade20k")


@pytest.fixture
def run(make_record):
    """Makes a run that fits the papers of SC-CLIP on ViT-B/16."""

    def make(**fields):
        spec = {"arch": "ViT-B-16-quickgelu", **fields.pop("spec", {})}
        return make_record(spec=spec, **fields)

    return make


def _table(records, paper="direct-seg", number="1", protocol=None):
    (section,) = arrange(paper, number, [of_record(record) for record in records], protocol).sections
    return section


def _row(section, **settings):
    for row in section.rows:
        named = dict(zip(section.settings, row.settings, strict=True))
        if all(named.get(name) == value for name, value in settings.items()):
            return {
                (col.dataset, col.figure): cell for col, cell in zip(section.columns, row.cells, strict=True)
            }, named
    raise AssertionError(settings)


def _sc_clip(section, **settings):
    return _row(section, row="SC-CLIP", backbone="ViT-B/16", **settings)


def test_a_fitting_run_stands_beside_its_number(run):
    record = run(intersect=(50, 10))
    cells, named = _sc_clip(_table([record]))
    cell = cells["voc21", "mIoU"]
    assert (cell.value, cell.run_id, cell.published) == (record.metrics.miou, record.run_id, "64.6")
    assert cell.difference == record.metrics.miou - 64.6
    assert named["state"] == ""
    assert cells["ade20k", "mIoU"].value is None and cells["ade20k", "mIoU"].published == "20.1"
    others = [cell for row in _table([record]).rows for cell in row.cells if cell.value is not None]
    assert others == [cell]


def test_columns_are_in_the_papers_order():
    assert [column.dataset for column in _table([]).columns] == [*EIGHT, "mean8"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"spec": {"weights": "builtin", "demo": True}}, "it is a demo"),
        ({"spec": {"weights": "builtin"}}, "builtin weights"),
        ({"spec": {"weights": "random"}}, "random weights"),
        ({"partial": True, "reason": "limited"}, "it is partial"),
        ({"status": "failed", "reason": "out of memory"}, "the run failed"),
        ({"spec": {"arch": "ViT-B-32"}}, "arch is ViT-B-32"),
        ({"spec": {"weights": "laion2b"}}, "weights are laion2b, not openai"),
        ({"spec": {"protocol": "common"}}, "protocol is common, not sc-clip"),
        ({"spec": {"protocol": {"name": "sc-clip", "prob_thd": 0.7}}}, "protocol has overrides: prob_thd=0.7"),
        ({"spec": {"method_options": {"beta": 0.5}}}, "options are not the method's own: beta=0.5"),
    ],
)
def test_what_is_no_result_is_refused_with_its_reason(run, change, reason):
    record = run(**change)
    section = _table([record])
    cells, named = _sc_clip(section)
    cell = cells["voc21", "mIoU"]
    assert cell.value is None and cell.published == "64.6" and named["state"] == "no run"
    assert [item.run_id for item in cell.refused] == [record.run_id]
    assert reason in cell.refused[0].reason
    assert any("fits no cell" in note for note in section.notes)
    table = arrange("direct-seg", "1", [of_record(record)])
    assert f"    refused  {record.run_id}: " in "\n".join(render.explain(table))
    # in no way of writing it does any number of ours appear
    for text in (render.to_markdown(table), render_markup.to_latex(table), render_markup.to_html(table)):
        assert f"{record.metrics.miou:.2f}" not in text
    assert all(row["value"] == "" for row in csv.DictReader(io.StringIO(render.to_csv(table))))


def test_the_newest_fitting_run_counts_and_the_others_are_listed(run):
    older, newer, refused = run(intersect=(50, 10)), run(intersect=(40, 20)), run(spec={"protocol": "common"})
    section = _table([refused, newer, older])
    cell = _sc_clip(section)[0]["voc21", "mIoU"]
    assert (cell.run_id, cell.others) == (newer.run_id, (older.run_id,))
    assert [item.run_id for item in cell.refused] == [refused.run_id]
    assert RULE in section.notes


def test_fitting_runs_that_differ_are_said_to(run):
    records = [run(), run(spec={"dtype": "bfloat16"})]
    section = _table(records)
    cell = _sc_clip(section)[0]["voc21", "mIoU"]
    assert "fitting runs differ in dtype: bfloat16, float32" in cell.remarks
    assert any("Fitting runs differ in dtype" in note for note in section.notes)


def test_another_protocol_may_be_asked_for_and_is_named(run):
    section = _table([run(), run(spec={"protocol": "common"})], protocol="common")
    cell = _sc_clip(section)[0]["voc21", "mIoU"]
    assert cell.value is not None and "not common" in cell.refused[0].reason
    assert any("one protocol that the user chose (sc-clip: common)" in note for note in section.notes)
    own = _table([run()])
    assert any("its method's own protocol (sc-clip: sc-clip)" in note for note in own.notes)


def test_a_weights_file_fits_and_is_named(run):
    section = _table([run(spec={"weights": "ViT-B-16.pt"})])
    assert _sc_clip(section)[0]["voc21", "mIoU"].value is not None
    assert any("Weights are the file ViT-B-16.pt; the paper's are 'openai'" in note for note in section.notes)


def test_a_mean_needs_every_benchmark_and_is_taken_unrounded(run):
    records = [run(dataset=name, intersect=(50 - index, 10)) for index, name in enumerate(EIGHT)]
    cells, _ = _sc_clip(_table(records))
    mean = cells["mean8", "mIoU"]
    assert mean.value == sum(record.metrics.miou for record in records) / 8
    assert mean.sources == tuple(record.run_id for record in records)
    assert mean.difference == mean.value - 43.9
    cells, _ = _sc_clip(_table(records[:7]))
    assert cells["mean8", "mIoU"].value is None
    assert cells["mean8", "mIoU"].remarks == ("no mean: 1 of 8 benchmarks have no run",)


def test_no_mean_over_runs_of_different_settings(run):
    records = [run(dataset=name) for name in EIGHT[:7]] + [run(dataset=EIGHT[7], spec={"dtype": "bfloat16"})]
    mean = _sc_clip(_table(records))[0]["mean8", "mIoU"]
    assert mean.value is None
    assert mean.remarks == ("no mean: runs differ in dtype: bfloat16, float32",)


def test_rows_say_why_they_have_no_number_of_ours(run, monkeypatch):
    from ovbench.tables import paper

    # the paper's own methods may be built or not
    monkeypatch.setattr(paper, "method_names", lambda *_: ["clip", "sc-clip", "discrepancy-op"])
    section = _table([run()])
    assert _row(section, row="FreeDa")[1]["state"] == "published only"
    assert _row(section, row="CASS")[1]["state"] == "not built"
    assert _row(section, row="CLIP")[1]["state"] == "no run"
    assert _sc_clip(section)[1]["state"] == ""
    ablation = _table([], number="2")
    assert _row(ablation, row="(V) (IV) + O.P.")[1]["state"] == "no run"
    monkeypatch.setattr(paper, "method_names", lambda *_: ["lsmseg"])
    assert {
        dict(zip(s.settings, row.settings, strict=True))["state"]
        for s in [_table([], "thesis-lsmseg", "5.9")]
        for row in s.rows
    } == {"settings not stated"}


def test_unequal_data_is_said(run):
    records = [
        run(method="clip", provenance={"dataset_fingerprint": "12" * 32}),
        run(spec={"protocol": "sc-clip"}, provenance={"dataset_fingerprint": "34" * 32}),
    ]
    notes = _table(records).notes
    assert "voc21: rows differ in dataset fingerprint: 12121212, 34343434." in notes


def test_scn_has_no_table_and_says_so():
    table = arrange("scn", "", [])
    assert table.sections == () and "rather than guessed" in table.left_out[0]
    assert "rather than guessed" in render.to_markdown(table)


# --- cost ---------------------------------------------------------------------------------------------------------------


def _own(method, run, **fields):
    """Under its own preset: default settings are what the paper says of other people's methods."""
    return run(method=method, **fields)


def test_cost_stands_beside_the_printed_cost_in_its_unit(run):
    record = _own("clip", run)
    section = _table([record], number="complexity")
    cells, _ = _row(section, row="CLIP")
    assert cells["voc21", "params"].value == 149.6 and cells["voc21", "params"].difference == 0
    assert cells["voc21", "flops"].value == 70.0  # of the image, whose window is a fourth of it
    assert cells["voc21", "latency"].value == pytest.approx(0.011)  # seconds, as printed
    headings = [column.heading for column in section.columns]
    assert headings == ["voc21 MACs (G)", "voc21 parameters (M)", "voc21 latency (s)", "voc21 mIoU (%)"]
    assert "voc21 MACs (G): ours counted by counter; input 1x3x224x224 (CLIP)." in section.notes
    solver = run(method="discrepancy-op", spec={"protocol": "direct-seg"})
    notes = _table([solver], number="complexity").notes
    assert any("Dtype is float32; the paper's is float16" in note for note in notes)


def test_no_difference_is_taken_across_machines(run):
    cpu = _own("clip", run)
    cell = _row(_table([cpu], number="complexity"), row="CLIP")[0]["voc21", "latency"]
    assert cell.value is not None and cell.difference is None
    notes = _table([cpu], number="complexity").notes
    assert any("published on RTX 3090: no difference is taken across machines" in note for note in notes)
    gpu = _own("clip", run, environment_fields={"gpu": "NVIDIA GeForce RTX 3090", "device": "cuda"})
    cell = _row(_table([gpu], number="complexity"), row="CLIP")[0]["voc21", "latency"]
    assert cell.difference == pytest.approx(0.011 - 0.08)


@pytest.mark.parametrize(
    ("gpu", "same"), [("NVIDIA L40", True), ("NVIDIA L40S", False), ("NVIDIA A40", False), (None, False)]
)
def test_machines_are_recognised_by_whole_words(run, gpu, same):
    from ovbench.tables.match import same_machine

    assert same_machine("L40", of_record(run(environment_fields={"gpu": gpu}))) is same


def test_different_machines_in_one_latency_column_are_named(run):
    records = [
        _own("clip", run, environment_fields={"cpu": "CPU one"}),
        _own("proxyclip", run, environment_fields={"cpu": "CPU two", "threads": 4}),
    ]
    notes = _table(records, number="complexity").notes
    assert "voc21 latency (s): ours differ in cpu: CPU one, CPU two." in notes
    assert "voc21 latency (s): ours differ in threads: 2, 4." in notes


def test_whole_images_are_asked_for_where_the_paper_says_so(run):
    """It says so of its own method; the others it ran as they are, mostly on windows."""
    record = run(method="clip")  # its preset slides
    cells, _ = _row(_table([record], number="complexity"), row="CLIP")
    assert cells["voc21", "flops"].value == 70.0 and cells["voc21", "latency"].value is not None
    sliding = {"protocol": {"name": "direct-seg", "mode": "slide"}}
    cells, _ = _row(_table([run(method="discrepancy-op", spec=sliding)], number="complexity"), row="Ours (O.P.)")
    assert cells["voc21", "flops"].value is None and cells["voc21", "latency"].value is None
    assert "protocol.mode is slide, not whole" in cells["voc21", "latency"].refused[0].reason


def test_an_image_of_several_sizes_has_no_operations(run, make_record):
    several = {"forwards": None, "image_gmacs": None, "image_gmacs_reason": "the views have several sizes"}
    record = run(method="clip", efficiency=make_record().efficiency.model_dump() | several)
    cells, _ = _row(_table([record], number="complexity"), row="CLIP")
    assert "it has no MACs (the views have several sizes" in cells["voc21", "flops"].refused[0].reason


def test_random_weights_may_show_cost_and_are_named_but_no_accuracy(run):
    record = _own("clip", run, spec={"weights": "random"})
    section = _table([record], number="complexity")
    cells, _ = _row(section, row="CLIP")
    assert cells["voc21", "params"].value == 149.6 and cells["voc21", "mIoU"].value is None
    assert any(note.startswith("Random weights (CLIP: ") and record.run_id in note for note in section.notes)


# --- profiles -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def head(make_record):
    """Makes a stored profile of a decode head; fields as ``ovbench profile --save`` writes them."""
    clock = [0]

    def make(method="psp", *, params=23.15, gmacs=77.68, spec=None, efficiency=None):
        clock[0] += 1
        return {
            "schema_version": 1,
            "run_id": f"profile-{clock[0]}",
            "spec": {
                "method": method, "method_options": {}, "part": "decode_head", "arch": None, "weights": "random",
                "dataset": None, "classes": 150, "features": "128x128,64x64,64x64,64x64", "count": "modules",
                "dtype": "float32", "device": "cpu", **(spec or {}),
            },
            "spec_hash": "0" * 64,
            "efficiency": {
                "params_m": params, "trainable_params_m": params, "gmacs": gmacs, "gflops": 2 * gmacs,
                "input": "C4 1x2048x64x64", "tool": "counter", "latency_ms_reason": "not measured",
                "images_per_s_reason": "not measured", "peak_memory_mib_reason": "not measured",
                "image_gmacs_reason": "no image", "convention": "modules", "counted": "convolution and linear",
                "parts": {"psp_modules": {"params_m": 1, "trainable_params_m": 1}}, **(efficiency or {}),
            },
            "environment": make_record().environment.model_dump(mode="json"),
            "provenance": {"finished": datetime(2026, 1, 2, 3, clock[0], tzinfo=timezone.utc).isoformat()},
        }  # fmt: skip

    return make


@pytest.fixture
def stored(tmp_path):
    def load(*found):
        for data in found:
            path = tmp_path / "profiles" / data["spec"]["method"] / f"{data['run_id']}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(data), encoding="utf-8")
        return profiles.load_all(tmp_path / "profiles", on_problem=lambda text: pytest.fail(text))

    return load


def _psp(measured, row="PSPNet"):
    (section,) = arrange("thesis-caa", "3.5", measured).sections
    return _row(section, row=row)[0], section


def test_profiles_of_heads_fill_the_efficiency_table(head, stored):
    cells, section = _psp(stored(head(), head("ccnet", params=24.0, gmacs=100.24)))
    assert cells["ade20k", "params"].difference == pytest.approx(0.01)
    assert cells["ade20k", "flops"].value == 77.68 and cells["ade20k", "mIoU"].value is None
    text = render.to_markdown(arrange("thesis-caa", "3.5", stored(head())))
    assert "| PSPNet | ResNet-50 | psp |  | 23.15 | 23.14 | +0.04% | 77.68 | 77.71 | −0.04% | – | 42.48 | – |" in text
    assert any("counted by modules (convolution and linear); input C4 1x2048x64x64" in note for note in section.notes)
    assert any(note.startswith("Random weights (PSPNet") for note in section.notes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"spec": {"part": None}}, "part is not recorded, not decode_head"),
        ({"spec": {"features": "64x64,32x32,32x32,32x32"}}, "features is 64x64,32x32,32x32,32x32"),
        ({"spec": {"classes": 19}}, "classes is 19, not 150"),
        ({"efficiency": {"gmacs": None, "gmacs_reason": "cannot be traced"}}, "it has no MACs (cannot be traced)"),
    ],
)
def test_profiles_of_something_else_are_refused(head, stored, change, reason):
    cells, _ = _psp(stored(head(**change)))
    assert cells["ade20k", "flops"].value is None
    assert reason in cells["ade20k", "flops"].refused[0].reason


def test_another_convention_is_shown_and_said(head, stored):
    cells, section = _psp(stored(head(spec={"count": "torch"}, efficiency={"convention": "torch"})))
    assert cells["ade20k", "flops"].value == 77.68
    assert any("Count is torch; the paper's is modules (PSPNet" in note for note in section.notes)


def test_a_decode_head_is_not_a_whole_method(head, stored, run):
    measured = [*stored(head("clip", spec={"arch": "ViT-B-16"})), of_record(_own("clip", run))]
    (section,) = arrange("direct-seg", "complexity", measured).sections
    cell = _row(section, row="CLIP")[0]["voc21", "params"]
    assert cell.value == 149.6 and "the number is for the whole method" in cell.refused[0].reason


def test_a_marked_figure_says_so(head, stored):
    _, section = _psp(stored(head(efficiency={"unstable": {"latency_ms": "IQR / median is 0.4"}})))
    assert any("Latency_ms marked unstable: IQR / median is 0.4" in note for note in section.notes)


def test_a_file_that_is_no_profile_is_named(head, tmp_path):
    path = tmp_path / "psp" / "one.json"
    path.parent.mkdir()
    good = head()
    for content, words in (
        ("{", "no valid JSON"),
        (json.dumps({**good, "environment": None}), "environment"),
        (json.dumps({**good, "spec": {}}), "spec.method"),
        (json.dumps([]), "not a profile"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=words):
            profiles.read(path)
        problems: list[str] = []
        assert profiles.load_all(tmp_path, on_problem=problems.append) == [] and len(problems) == 1


def test_what_ovbench_profile_stores_can_be_read(head):
    """Every field that tables read is one that a profile has."""
    report = pytest.importorskip("ovbench.measure.profile.record")
    known = set(report.ProfileSpec.model_fields)
    assert {
        "method",
        "method_options",
        "part",
        "arch",
        "weights",
        "dataset",
        "features",
        "classes",
        "count",
        "dtype",
    } <= known
    figures = set(report.ProfileEfficiency.model_fields)
    assert set(profiles._ProfileFigures.model_fields) <= figures
    assert set(profiles._Profile.model_fields) <= set(report.ProfileRecord.model_fields)


# --- trained methods ----------------------------------------------------------------------------------------------------

SIX_SCALES = {"name": "closed-set", "flip": True, "scales": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)}


@pytest.fixture
def trained(make_record):
    """Makes a run with trained weights and every option of its method."""

    def make(method, *, arch=None, options=None, protocol="paper", dataset="ade20k", noted=None, **fields):
        from dataclasses import asdict

        from ovbench.registry import closed_set_class, method_class, method_info

        closed = method_info(method).track == "closed-set"
        cls = closed_set_class(method) if closed else method_class(method)
        spec = {
            "arch": arch or ("resnet50-v1c" if closed else "ViT-B-16"),
            "weights": "model.safetensors",
            "method_options": {**asdict(cls.configure(options or {})), **(noted or {})},
            "protocol": protocol,
            **fields.pop("spec", {}),
        }
        return make_record(method=method, dataset=dataset, spec=spec, **fields)

    return make


def _places(record):
    """All (table, row, backbone, training data) of the three theses that show this record."""
    found = set()
    for paper in ("thesis-caa", "thesis-ecac", "thesis-lsmseg"):
        for number in tables(paper):
            sections = arrange(paper, number, [of_record(record)]).sections
            for section, row in ((one, row) for one in sections for row in one.rows):
                if any(cell.value is not None and column.figure == "mIoU"
                       for cell, column in zip(row.cells, section.columns, strict=True)):  # fmt: skip
                    named = dict(zip(section.settings, row.settings, strict=True))
                    found.add((number, named["row"], named["backbone"], named.get("trained on", "")))
    return found


def _rows_of(record):
    return {(number, row) for number, row, _, _ in _places(record)}


CAA_FCN = {("3.2", "FCN + CC + SA"), ("3.3", "FCN + intra + inter"), ("3.4", "FCN+CAA aux + aff"), ("3.7", "FCN+CAA")}
ECAC_FCN = {
    ("4.2", "+ ECAC + L_rce + L_mem + L_KL + L_mse"),
    ("4.3", "alpha=1 beta=50"),
    ("4.4", "ECAC (masked centre update)"),
    ("4.7", "FCN+ECAC"),
}


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("fcn", {}, {("3.2", "FCN Baseline"), ("3.3", "FCN Baseline"), ("3.7", "FCN"), ("4.6", "FCN"), ("4.7", "FCN")}),
        ("caa-fcn", {}, CAA_FCN),
        ("caa-fcn", {"affinity": False}, {("3.2", "FCN + CC")}),
        ("caa-fcn", {"center": False}, {("3.2", "FCN + SA")}),
        ("caa-fcn", {"inter": False}, {("3.3", "FCN + intra-class")}),
        ("caa-fcn", {"intra": False}, {("3.3", "FCN + inter-class")}),
        ("caa-fcn", {"aux_weight": 0, "affinity_weight": 0}, {("3.4", "FCN+CAA no aux, no aff")}),
        ("caa-fcn", {"aux_weight": 0}, {("3.4", "FCN+CAA aff")}),
        ("caa-fcn", {"affinity_weight": 0}, {("3.4", "FCN+CAA aux")}),
        ("caa-fcn", {"affinity": False, "aux_weight": 0}, set()),
        ("caa-fcn", {"row_normalise": False}, set()),
        ("caa-fcn", {"auxiliary_head": False}, set()),
        ("caa-segnext", {}, set()),
    ],
)
def test_options_choose_the_row_of_an_ablation(trained, method, options, expected):
    assert _rows_of(trained(method, options=options)) == expected


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("ecac-fcn", {}, ECAC_FCN),
        ("ecac-fcn", {"ecac": False, "reweight": False}, {("4.2", "FCN baseline"), ("4.4", "FCN baseline")}),
        ("ecac-fcn", {"ecac": False}, {("4.2", "+ L_rce")}),
        ("ecac-fcn", {"memory_loss": False, "kl_weight": 0, "iv_weight": 0}, {("4.2", "+ ECAC + L_rce")}),
        (
            "ecac-fcn",
            {"kl_weight": 0, "iv_weight": 0},
            {("4.2", "+ ECAC + L_rce + L_mem"), ("4.3", "alpha=0 beta=0")},
        ),
        (
            "ecac-fcn",
            {"iv_weight": 0},
            {
                ("4.2", "+ ECAC + L_rce + L_mem + L_KL"),
                ("4.3", "alpha=1 beta=0"),
                ("4.3", "alpha=1 beta=0 (second block)"),
            },
        ),
        ("ecac-fcn", {"kl_weight": 0.1, "iv_weight": 0}, {("4.3", "alpha=0.1 beta=0")}),
        ("ecac-fcn", {"iv_weight": 200}, {("4.3", "alpha=1 beta=200")}),
        ("ecac-fcn", {"memory_update": "cosine"}, {("4.4", "ECAC (cosine update)")}),
        ("deeplabv3plus", {}, {("4.5", "DeepLabV3+"), ("4.7", "DeepLabV3+")}),
        ("ecac-deeplabv3plus", {"calibration": False}, {("4.5", "DeepLabV3+ + ECAC")}),
        ("ecac-deeplabv3plus", {}, {("4.5", "DeepLabV3+ + ECAC + calibration"), ("4.7", "DeepLabV3+ + ECAC")}),
    ],
)
def test_options_choose_the_row_of_an_ablation_on_context(trained, method, options, expected):
    assert _rows_of(trained(method, options=options, dataset="context59")) == expected


@pytest.mark.parametrize("protocol", ["closed-set-ms", SIX_SCALES])
def test_several_scales_stand_beside_several_scales_only(trained, protocol):
    assert _rows_of(trained("caa-fcn", protocol=protocol)) == set()
    assert _places(trained("caa-uper", arch="resnet101-v1c", protocol=protocol)) == {
        ("3.1", "UperNet+CAA", "ResNet101", ""),
        ("4.1", "CAA", "ResNet-101", ""),
    }
    assert _places(trained("caa-uper", arch="swin-l", protocol=protocol)) == {("3.1", "UperNet+CAA", "Swin-Large", "")}
    assert _places(trained("caa-uper", arch="vit-l", protocol=protocol)) == {("3.1", "UperNet+CAA", "ViT-Large", "")}
    assert _places(trained("ecac-uper", arch="swin-b", protocol=protocol)) == {
        ("4.1", "UperNet + ECAC", "Swin-Base", "")
    }
    assert _places(trained("ecac-segnext", arch="mscan-l", protocol=protocol)) == {
        ("4.1", "SegNeXt + ECAC", "MSCAN-L", "")
    }
    assert _places(trained("ecac-segnext", arch="mscan-b", protocol=protocol)) == set()
    assert _places(trained("caa-uper", arch="swin-t", protocol=protocol)) == set()


@pytest.mark.parametrize(
    "change",
    [
        {"arch": "resnet101-v1c"},
        {"arch": "resnet18-v1c"},
        {"arch": "swin-l"},
        {"protocol": {"name": "closed-set", "flip": True}},
        {"protocol": {"name": "closed-set", "scales": (0.5, 1.0)}},
        {"protocol": {"name": "closed-set-ms", "flip": False}},
        {"protocol": {"name": "closed-set", "short_side": 640}},
        {"protocol": {"name": "closed-set-ms", "short_side": 640}},
        {"protocol": "common"},
        {"spec": {"weights": "random"}},
        {"spec": {"demo": True}},
        {"partial": True, "reason": "weights of a trial"},
        {"status": "failed", "reason": "out of memory"},
        {"noted": {"training_overrides": ["iters=1000"]}},
        {"dataset": "cityscapes"},
    ],
)
def test_what_is_no_result_of_a_trained_method_stands_nowhere(trained, change):
    assert _rows_of(trained("caa-fcn")) == CAA_FCN
    assert _rows_of(trained("caa-fcn", **change)) == set()


def test_a_chosen_protocol_does_not_let_others_in(trained):
    record = trained("caa-uper", arch="resnet101-v1c", protocol="closed-set-ms")

    def shown(protocol):
        (section,) = arrange("thesis-caa", "3.1", [of_record(record)], protocol).sections
        return [cell.value for row in section.rows for cell in row.cells if cell.value is not None]

    assert len(shown(None)) == len(shown("closed-set-ms")) == 1 and shown("common") == []


def test_heads_for_another_encoder_are_refused(head, stored):
    same, other = head(params=23.15, spec={"arch": "resnet50-v1c"}), head(params=9.0, spec={"arch": "swin-l"})
    cell = _psp(stored(same, other))[0]["ade20k", "params"]
    assert cell.value == 23.15 and [item.reason for item in cell.refused] == ["arch is swin-l"]


NO_AGGREGATION = {"layers": 0, "visual": "none", "filter_k": 0}
FUSION = {"name": "lsmseg", "templates": "cat-seg"}
LSMSEG = {("5.1", "LSMSeg"), ("5.5", "32"), ("5.6", "LSMSeg(w/ SAM-L)"), ("5.10", "CLIP _qv"), ("5.11", "LSMSeg")}


def _said(templates):
    return {"name": "lsmseg", "templates": templates}


@pytest.mark.parametrize(
    ("options", "protocol", "expected"),
    [
        ({}, "paper", LSMSEG),
        ({"filter_k": 16, "pad_len": 16}, "paper", {("5.5", "16")}),
        ({"filter_k": 96, "pad_len": 96}, "paper", {("5.5", "96")}),
        ({"filter_k": 16}, "paper", set()),
        ({"filter_k": 20, "pad_len": 20}, "paper", set()),
        ({"visual": "none"}, "paper", {("5.6", "LSMSeg(w/o SAM)")}),
        ({"visual": "dinov2-b"}, "paper", {("5.6", "LSMSeg(w/ Dinov2-B)")}),
        ({"visual": "sam-b"}, "paper", {("5.6", "LSMSeg(w/ SAM-B)")}),
        ({"fusion": "concat"}, "paper", set()),
        ({"fusion": "concat", "filter_k": 0, "pad_len": 256}, FUSION, {("5.7", "Concat")}),
        ({"fusion": "attention", "filter_k": 0, "pad_len": 256}, FUSION, {("5.7", "Attn")}),
        ({"filter_k": 0, "pad_len": 256}, FUSION, {("5.7", "Weighted")}),
        ({}, _said("lsmseg:colour"), set()),
        (NO_AGGREGATION, _said("cat-seg"), {("5.3", "Baseline")}),
        (NO_AGGREGATION, _said("lsmseg:colour"), {("5.3", "Color")}),
        (NO_AGGREGATION, _said("lsmseg:state"), {("5.3", "Action or Satae")}),
        (NO_AGGREGATION, _said("lsmseg:size"), {("5.3", "Size"), ("5.4", "Size")}),
        (NO_AGGREGATION, _said("lsmseg:size+shape"), {("5.4", "Size + Shape")}),
        (NO_AGGREGATION, _said("lsmseg:shape+size"), set()),
        (NO_AGGREGATION, _said("mine.json"), set()),
    ],
)
def test_options_and_prompts_choose_the_row_of_lsmseg(trained, options, protocol, expected):
    noted = {"trained_on": "coco_stuff"}
    record = trained("lsmseg", options=options, protocol=protocol, noted=noted)
    assert _rows_of(record) == expected
    demo = trained("lsmseg", options=options, protocol=protocol, noted=noted, spec={"demo": True})
    assert _rows_of(demo) == set()


def test_cat_seg_stands_beside_its_rows(trained):
    b16 = {(number, row, "ViT-B/16", "COCO-Stuff") for number, row in (
        ("5.1", "CAT-Seg"), ("5.6", "CATSeg"), ("5.7", "Baseline"), ("5.11", "CAT-Seg"),
    )}  # fmt: skip
    assert _places(trained("cat-seg")) == b16
    assert _places(trained("cat-seg", arch="openai-format-ViT-12x768-16")) == b16
    l14 = {("5.1", "CAT-Seg", "ViT-L/14", "COCO-Stuff")}
    assert _places(trained("cat-seg", arch="ViT-L-14-336")) == l14
    assert _places(trained("cat-seg", arch="openai-format-ViT-24x1024-14")) == l14
    assert _places(trained("cat-seg", arch="ViT-L-14")) == _places(trained("cat-seg", arch="ViT-B-32")) == set()


def test_training_data_choose_the_row(trained):
    for where, printed in (("context59", "PC-59"), ("ade20k", "A-150")):
        record = trained("lsmseg", noted={"trained_on": where})
        assert _places(record) == {("5.11", "LSMSeg", "ViT-B/16", printed)}
    unsaid = trained("lsmseg")  # a foreign checkpoint: COCO-Stuff, as all public ones, and said
    assert _rows_of(unsaid) == LSMSEG
    (section,) = arrange("thesis-lsmseg", "5.11", [of_record(unsaid)]).sections
    assert any("trained_on is not recorded; the paper's is coco_stuff" in note for note in section.notes)


@pytest.mark.parametrize(
    ("policy", "row"), [("frozen-clip", "Freeze"), ("attention-qk", "CLIP _qk"), ("attention-kv", "CLIP _kv")]
)
def test_what_was_trained_chooses_the_row(trained, policy, row):
    noted = {"trained_on": "coco_stuff", "training_overrides": [f"policy={policy}"]}
    assert _rows_of(trained("lsmseg", noted=noted)) == {("5.10", row)}


# --- writers ------------------------------------------------------------------------------------------------------------


def _written(records):
    table = arrange("direct-seg", "1", [of_record(record) for record in records])
    return {
        "markdown": render.to_markdown(table),
        "csv": render.to_csv(table, explained=True),
        "json": json.dumps(render.to_data(table)),
        "latex": render_markup.to_latex(table),
        "html": render_markup.to_html(table, render.explain(table)),
    }


def test_the_order_of_records_changes_nothing(run):
    records = [run(dataset=name, spec={"protocol": protocol}) for name in EIGHT for protocol in ("sc-clip", "common")]
    assert _written(records) == _written(records[::-1])


def test_csv_has_the_unrounded_numbers(run):
    record = run(intersect=(30, 10))
    rows = list(csv.DictReader(io.StringIO(_written([record])["csv"])))
    (row,) = [row for row in rows if row["value"]]
    assert float(row["value"]) == record.metrics.miou and row["published"] == "64.6"
    assert float(row["difference"]) == record.metrics.miou - 64.6
    assert row["run_id"] == record.run_id and row["row"] == "SC-CLIP"
    assert len(rows) == len(_table([]).rows) * 9 - sum(
        cell.published is None for row in _table([]).rows for cell in row.cells
    )


def test_latex_is_a_booktabs_table_with_equal_rows(run):
    text = _written([run(spec={"weights": "a_b&c%.pt"})])["latex"]
    body = [line for line in text.splitlines() if line.endswith(r"\\") and "textbf" not in line]
    (columns,) = [line for line in text.splitlines() if line.startswith(r"\begin{tabular}")]
    width = len(columns.split("{")[-1].rstrip("}"))
    assert {line.replace(r"\&", "").count("&") for line in body[1:]} == {width - 1}
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 1
    assert r"a\_b\&c\%.pt" in text and "−" not in text and "–" not in text
    rules = [line for line in text.splitlines() if line.startswith(r"\cmidrule")]
    assert rules[0].endswith(f"-{width}}}")


def test_html_is_whole_and_escaped(run):
    from html.parser import HTMLParser

    text = _written([run(spec={"weights": "<b>&.pt"})])["html"]
    assert "<b>&.pt" not in text and "&lt;b&gt;&amp;.pt" in text
    assert "http" not in text and "<script" not in text
    stack, cells = [], []

    class Check(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag == "tr":
                cells.append(0)
            if tag in ("td", "th"):
                cells[-1] += int(dict(attributes).get("colspan", 1))
            if tag != "meta":
                stack.append(tag)

        def handle_endtag(self, tag):
            assert stack.pop() == tag

    Check().feed(text)
    assert stack == [] and len(set(cells)) == 1


def test_a_narrow_terminal_gets_several_tables(run):
    section = _table([run()])
    assert len(render.to_rich(section)) == 1
    blocks = render.to_rich(section, 120)
    assert len(blocks) > 2
    from rich.console import Console

    for block in blocks:
        buffer = io.StringIO()
        Console(file=buffer, width=120).print(block)
        assert "…" not in buffer.getvalue() and "SC-CLIP" in buffer.getvalue()
