from __future__ import annotations

import json
import re
from itertools import pairwise

import numpy as np
import pytest

from ovbench.errors import DataError, UsageError
from ovbench.results import bootstrap, image_areas, store
from ovbench.results.compare import compare, find
from ovbench.results.image_areas import ImageAreas
from ovbench.results.record import metrics_from_areas
from ovbench.tables import pareto

NAMES = ("sky", "road", "sea", "sun")


def _areas(seed, images=7, classes=4, names=None):
    """Areas of images in which some classes do not occur."""
    random = np.random.default_rng(seed)
    label = random.integers(0, 50, (images, classes)) * (random.random((images, classes)) < 0.6)
    pred = np.random.default_rng(seed + 1000).integers(0, 50, (images, classes))
    inter = np.minimum(label, pred) // 2
    return ImageAreas(names or tuple(f"{i}.png" for i in range(images)), inter, pred, label)


def _with_label(areas, label, seed):
    random = np.random.default_rng(seed)
    pred = random.integers(0, 50, label.shape)
    return ImageAreas(areas.names, np.minimum(label, pred) // 3, pred, label)


@pytest.fixture
def stored(make_record, tmp_path):
    """Writes a record with its areas per image and gives what ``find`` finds."""

    def write(areas: ImageAreas, **fields):
        names = NAMES[: areas.label.shape[1]]
        sums = [array.sum(axis=0) for array in (areas.intersect, areas.union, areas.pred, areas.label)]
        record = make_record(metrics=metrics_from_areas(names, *sums, images=len(areas.names)), **fields)
        path = store.write(record, tmp_path / "runs")
        header = {
            "version": 1, "spec_hash": record.spec_hash, "run_id": record.run_id,
            "dataset_fingerprint": record.provenance.dataset_fingerprint,
        }  # fmt: skip
        lines = [header]
        order = np.random.default_rng(0).permutation(len(areas.names))  # images finish in any order
        for index in order.tolist():
            used = np.flatnonzero((areas.pred[index] > 0) | (areas.label[index] > 0))
            entry = {name: getattr(areas, name)[index, used].tolist() for name in ("intersect", "pred", "label")}
            lines.append(
                {"index": index, "name": areas.names[index], "classes": used.tolist(), **entry, "times_ms": {}}
            )
        text = "".join(json.dumps(line) + "\n" for line in lines)
        image_areas.path_beside(path).write_text(text, encoding="utf-8")
        return find(record.run_id, tmp_path / "runs")

    return write


# --- areas --------------------------------------------------------------------------------------------------------------


def test_areas_come_back_as_they_were_written(stored):
    areas = _areas(1)
    run = stored(areas)
    read = image_areas.read(image_areas.path_beside(run.path), run.record)
    assert read.names == areas.names
    for name in ("intersect", "pred", "label", "union"):
        assert getattr(read, name).dtype == np.int64
        assert (getattr(read, name) == getattr(areas, name)).all()


def test_areas_that_a_run_writes_can_be_read(stored):
    """The file format is that of ``ovbench.evaluate.shards``, which needs torch."""
    import torch

    from ovbench.evaluate.shard_lines import ImageResult
    from ovbench.evaluate.shards import SUFFIX, VERSION, Shard
    from ovbench.ops.areas import Areas

    areas = _areas(2)
    run = stored(areas)
    path = image_areas.path_beside(run.path)
    path.unlink()
    header = {"spec_hash": "x", "dataset_fingerprint": run.record.provenance.dataset_fingerprint, "run_id": "y"}
    shard = Shard(path, header, 4)
    for index, name in enumerate(areas.names):
        parts = (torch.from_numpy(getattr(areas, part)[index].copy()) for part in ("intersect", "pred", "label"))
        shard.append([ImageResult(index, name, Areas(*parts), {"total": 1.0})])
    shard.close()
    assert (image_areas.SUFFIX, image_areas.VERSION) == (SUFFIX, VERSION)
    read = image_areas.read(path, run.record)
    assert (read.intersect == areas.intersect).all() and (read.label == areas.label).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: lines[:-1], "sums of"),
        (lambda lines: [lines[0].replace('"version": 1', '"version": 9'), *lines[1:]], "version 9"),
        (lambda lines: [lines[0].replace("cdcd", "efef"), *lines[1:]], "another run"),
        (lambda lines: [*lines[:-1], lines[-1][:20]], "broken"),
        (lambda lines: [line.replace('"classes": [0', '"classes": [7') for line in lines], "does not fit"),
    ],
)
def test_areas_that_do_not_belong_to_the_record_are_refused(stored, change, words):
    run = stored(_areas(1))
    path = image_areas.path_beside(run.path)
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    with pytest.raises(DataError, match=words):
        image_areas.read(path, run.record)


# --- bootstrap ----------------------------------------------------------------------------------------------------------


def _loop_miou(areas, drawn):
    """Summed areas and their mIoU, one image and one class at a time, in Python's integers."""
    scores = []
    for k in range(areas.label.shape[1]):
        inter = sum(int(areas.intersect[i, k]) for i in drawn)
        union = sum(int(areas.pred[i, k] + areas.label[i, k] - areas.intersect[i, k]) for i in drawn)
        if union:
            scores.append(100.0 * inter / union)
    return sum(scores) / len(scores)


@pytest.mark.parametrize("chunk", [1, 10**9])
def test_bootstrap_against_a_loop(monkeypatch, chunk):
    monkeypatch.setattr(bootstrap, "_CHUNK_BYTES", chunk)  # one resample at a time, or all at once
    first = _areas(3)
    second = _with_label(first, first.label, 4)
    found = bootstrap.paired_differences(first, second, resamples=50, seed=5)
    generator = np.random.Generator(np.random.PCG64(5))
    for value in found:
        drawn = generator.integers(7, size=7).tolist()
        assert value == pytest.approx(_loop_miou(second, drawn) - _loop_miou(first, drawn), abs=1e-10)


def test_large_areas_stay_exact(monkeypatch):
    first = _areas(3)
    scaled = [ImageAreas(first.names, *(array * 2**45 for array in (first.intersect, first.pred, first.label)))]
    scaled.append(_with_label(first, first.label, 4))
    scaled[1] = ImageAreas(first.names, *(getattr(scaled[1], n) * 2**45 for n in ("intersect", "pred", "label")))
    small = bootstrap.paired_differences(first, _with_label(first, first.label, 4), 20)
    assert bootstrap.paired_differences(scaled[0], scaled[1], 20) == pytest.approx(small, abs=1e-9)
    # and where float64 would not be exact, integers are used: the last pixel counts
    huge = ImageAreas(("a",), np.array([[2**60]]), np.array([[2**60 + 1]]), np.array([[2**60]]))
    sums = []
    monkeypatch.setattr(bootstrap, "miou", lambda inter, union: sums.append(int(union[0, 0])) or np.zeros(len(inter)))
    bootstrap.paired_differences(huge, huge, 1)
    assert sums == [2**60 + 1] * 2


def test_identical_runs_differ_by_exactly_0():
    areas = _areas(6, images=40)
    sure = bootstrap.interval(areas, areas, resamples=500)
    assert (sure.difference, sure.low, sure.high, sure.above_zero) == (0.0, 0.0, 0.0, 0.5)


def test_the_seed_decides():
    first = _areas(3)
    second = _with_label(first, first.label, 4)
    same = [bootstrap.interval(first, second, resamples=200, seed=1) for _ in range(2)]
    assert same[0] == same[1]
    assert bootstrap.interval(first, second, resamples=200, seed=2) != same[0]


def test_the_interval_is_made_of_quantiles_of_the_resamples():
    first = _areas(3, images=30)
    second = _with_label(first, first.label, 4)
    drawn = bootstrap.paired_differences(first, second, 1000, seed=0)
    sure = bootstrap.interval(first, second, resamples=1000, confidence=90)
    assert (sure.low, sure.high) == tuple(np.quantile(drawn, [0.05, 0.95]).tolist())
    assert sure.low < sure.difference < sure.high
    assert sure.above_zero == (drawn > 0).mean()


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Images from one generator: in most draws of 60 of them the interval holds the difference of all 3000."""
    everything = _areas(11, images=3000)
    other = _with_label(everything, everything.label, 12)
    whole = bootstrap.miou(other.intersect.sum(0), other.union.sum(0)) - bootstrap.miou(
        everything.intersect.sum(0), everything.union.sum(0)
    )
    hits = 0
    for trial in range(50):
        part = slice(60 * trial, 60 * trial + 60)
        pair = [
            ImageAreas(run.names[part], run.intersect[part], run.pred[part], run.label[part])
            for run in (everything, other)
        ]
        sure = bootstrap.interval(*pair, resamples=400, seed=trial)
        hits += sure.low <= whole <= sure.high
    assert 42 <= hits <= 50


def test_classes_that_no_drawn_image_has_are_left_out():
    inter = np.array([[5, 0], [0, 0]])
    areas = ImageAreas(("a", "b"), inter, np.array([[10, 0], [0, 0]]), np.array([[5, 0], [0, 0]]))
    assert bootstrap.miou(areas.intersect.sum(0), areas.union.sum(0)) == 50.0
    assert np.isnan(bootstrap.miou(np.zeros(2, int), np.zeros(2, int)))
    assert set(bootstrap.paired_differences(areas, areas, 20)) == {0.0}


@pytest.mark.parametrize("options", [{"resamples": 0}, {"confidence": 0}, {"confidence": 100}])
def test_impossible_bootstraps_are_refused(options):
    with pytest.raises(UsageError):
        bootstrap.interval(_areas(1), _areas(1), **options)


# --- comparison ---------------------------------------------------------------------------------------------------------


def test_classes_are_sorted_by_their_difference(stored):
    first = _areas(3)
    runs = [stored(first), stored(_with_label(first, first.label, 4), method="clip")]
    found = compare(*runs, resamples=100)
    pairs = [{score.name: score.iou for score in run.record.metrics.classes} for run in runs]
    assert {entry.name: entry.difference for entry in found.classes} == {
        name: pairs[1][name] - pairs[0][name] for name in NAMES
    }
    assert all(one.difference >= other.difference for one, other in pairwise(found.classes))
    assert found.difference == runs[1].record.metrics.miou - runs[0].record.metrics.miou
    assert found.interval.difference == pytest.approx(found.difference, abs=1e-10)
    assert found.settings["method"] == ("sc-clip", "clip")
    assert json.loads(json.dumps(found.to_data()))["interval"]["images"] == 7


def test_the_same_run_twice(stored):
    run = stored(_areas(3))
    found = compare(run, run, resamples=100)
    assert (found.difference, found.interval.low, found.interval.high) == (0.0, 0.0, 0.0)
    assert {ratio.ratio for ratio in found.ratios} == {1.0}
    assert not (found.warnings or found.data or found.protocol or found.settings or found.machine)


def test_absent_classes_come_last(stored):
    first = _areas(3)
    gone = [array.copy() for array in (first.intersect, first.pred, first.label)]
    for array in gone:
        array[:, 1] = 0
    found = compare(stored(first), stored(ImageAreas(first.names, *gone)), resamples=10)
    assert found.classes[-1].name == "road" and found.classes[-1].difference is None


def test_other_benchmarks_and_classes_are_refused(stored):
    with pytest.raises(UsageError, match="nothing to compare class by class"):
        compare(stored(_areas(3)), stored(_areas(3), dataset="ade20k"))
    with pytest.raises(UsageError, match="different classes"):
        compare(stored(_areas(3)), stored(_areas(3, classes=3)))


def test_other_images_have_no_paired_interval(stored):
    one, two = _areas(3), _areas(3, images=6)
    found = compare(stored(one), stored(two), resamples=10)
    assert found.interval is None
    assert found.interval_reason == "the image sets differ: 1 images only in the first run, 0 only in the second"
    assert any("different data: images 7 / 6" in warning for warning in found.warnings)
    other_label = _areas(5)
    found = compare(stored(one), stored(other_label), resamples=10)
    assert found.interval is None and "labels of the same images differ" in found.interval_reason


def test_areas_that_are_not_there_leave_the_rest(stored):
    runs = [stored(_areas(3)), stored(_areas(3))]
    image_areas.path_beside(runs[1].path).unlink()
    found = compare(*runs, resamples=10)
    assert found.interval is None and "lie beside the record" in found.interval_reason
    assert found.difference == 0.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spec": {"protocol": "common"}}, "different protocols: name sc-clip / common"),
        ({"provenance": {"dataset_fingerprint": "12" * 32}}, "dataset fingerprint cdcdcdcd / 12121212"),
        ({"spec": {"dataset_version": 2}}, "benchmark version 1 / 2"),
        ({"spec": {"weights": "random"}}, "RANDOM WEIGHTS"),
        ({"spec": {"weights": "builtin", "demo": True}}, "DEMO"),
        ({"partial": True, "reason": "limited"}, "PARTIAL"),
        ({"status": "interrupted", "partial": True, "reason": "Ctrl-C"}, "the run interrupted"),
    ],
)
def test_what_makes_a_difference_doubtful_is_said(stored, change, words):
    found = compare(stored(_areas(3)), stored(_areas(3), **change), resamples=10)
    assert any(words in warning for warning in found.warnings), found.warnings


def test_times_are_compared_on_one_machine_only(stored, make_record):
    slow = make_record().efficiency.model_dump() | {"image_gmacs": 140.0, "images_per_s": 40.0}
    runs = [stored(_areas(3)), stored(_areas(3), efficiency=slow)]
    ratios = {ratio.figure: ratio.ratio for ratio in compare(*runs, resamples=10).ratios}
    assert ratios == {"latency": 1.0, "images_per_s": 0.5, "memory": 1.0, "gmacs": 2.0, "params": 1.0}
    other = stored(_areas(3), environment_fields={"cpu": "CPU two"})
    found = compare(runs[0], other, resamples=10)
    ratios = {ratio.figure: ratio for ratio in found.ratios}
    assert ratios["params"].ratio == 1.0 and ratios["gmacs"].ratio == 1.0
    for name in ("latency", "images_per_s", "memory"):
        assert ratios[name].ratio is None
        assert ratios[name].reason == "the machines differ: cpu CPU one / CPU two"


def test_memory_and_operations_of_different_things_have_no_ratio(stored, make_record):
    other = make_record().efficiency.model_dump() | {"peak_memory_kind": "cuda-allocated", "tool": "fvcore"}
    found = compare(stored(_areas(3)), stored(_areas(3), efficiency=other), resamples=10)
    ratios = {ratio.figure: ratio for ratio in found.ratios}
    assert "measured differently" in ratios["memory"].reason and ratios["memory"].ratio is None
    assert "different tools" in ratios["gmacs"].reason and ratios["gmacs"].ratio is None


# --- finding runs -------------------------------------------------------------------------------------------------------


def test_runs_are_found_by_path_id_and_prefix(stored, tmp_path):
    run = stored(_areas(3))
    run_id, root = run.record.run_id, tmp_path / "runs"
    for name in (str(run.path), run_id, run_id[:18]):
        assert find(name, root).record == run.record
    other = stored(_areas(3))
    with pytest.raises(UsageError, match="begins several run ids"):
        find(run_id[:4], root)
    with pytest.raises(UsageError, match=f"Did you mean: .*{other.record.run_id}"):
        find(f"{other.record.run_id}x", root)
    with pytest.raises(UsageError, match="No run ''"):
        find("", root)


# --- plot ---------------------------------------------------------------------------------------------------------------


def _points(*pairs):
    return [pareto.Point(str(i), f"m{i}", cost, miou) for i, (cost, miou) in enumerate(pairs)]


def test_the_frontier_holds_what_nothing_beats():
    chosen = _points((10, 50), (20, 60), (15, 40), (20, 55), (30, 60), (40, 61), (5, 10))
    assert [(p.cost, p.miou) for p in pareto.frontier(chosen)] == [(5, 10), (10, 50), (20, 60), (40, 61)]
    for point in chosen:  # by the definition
        beaten = any(
            o.cost <= point.cost and o.miou >= point.miou and (o.cost, o.miou) != (point.cost, point.miou)
            for o in chosen
        )
        assert (point not in pareto.frontier(chosen)) == beaten


def test_points_of_runs(make_record):
    counted = make_record().efficiency.model_dump() | {"forwards": 12, "image_gmacs": 12 * 17.5}
    records = [make_record(method="clip", efficiency=counted), make_record(efficiency=counted)]
    found = pareto.points(records, "gmacs")
    assert [(p.label, p.cost, p.miou) for p in found] == [
        (record.spec.method, 12 * 17.5, record.metrics.miou) for record in records
    ]
    assert [p.cost for p in pareto.points(records, "latency")] == [11.0, 11.0]
    assert {p.group for p in found} == {""}


def test_labels_tell_runs_of_one_method_apart(make_record):
    records = [
        make_record(), make_record(spec={"dtype": "bfloat16"}), make_record(method="clip"),
        make_record(spec={"method_options": {"beta": 0.5}}),
    ]  # fmt: skip
    labels = [point.label for point in pareto.points(records, "latency")]
    assert len(set(labels)) == 4 and labels[2] == "clip"
    assert "bfloat16" in labels[1] and "beta=0.5" in labels[3]


def test_machines_and_kinds_are_groups_of_their_own(make_record):
    records = [
        make_record(method="clip"), make_record(environment_fields={"cpu": "CPU two"}),
        make_record(method="kk", spec={"weights": "random"}),
    ]  # fmt: skip
    groups = [point.group for point in pareto.points(records, "latency")]
    assert groups == [
        "results, cpu CPU one", "results, cpu CPU two", "random-weights, cpu CPU one",
    ]  # fmt: skip
    demo = [make_record(method=name, spec={"weights": "builtin", "demo": True}) for name in ("clip", "kk")]
    assert "DEMO" in pareto.headline(demo, "latency")


def test_runs_that_share_no_axis_are_refused(make_record):
    with pytest.raises(UsageError, match=r"several benchmarks \(ade20k, voc21\)"):
        pareto.points([make_record(), make_record(dataset="ade20k")], "latency")
    with pytest.raises(UsageError, match="has no gmacs"):
        several = {"forwards": None, "image_gmacs": None, "image_gmacs_reason": "views of several sizes"}
        pareto.points([make_record(efficiency=make_record().efficiency.model_dump() | several)], "gmacs")


def test_plots_are_files_with_the_same_bytes_and_free_labels(tmp_path):
    random = np.random.default_rng(0)
    chosen = [
        pareto.Point(str(i), f"method-{i}", float(cost), float(miou), f"group {i % 2}")
        for i, (cost, miou) in enumerate(zip(random.uniform(10, 40, 12), random.uniform(20, 70, 12), strict=True))
    ]
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        paths = [tmp_path / f"{name}{suffix}" for name in ("one", "two")]
        for path in paths:
            pareto.plot(chosen, "voc21", "latency", path)
        contents = [path.read_bytes() for path in paths]
        assert contents[0] == contents[1] and contents[0].startswith(start)
    with pytest.raises(UsageError, match=r"ends in \.png or \.svg"):
        pareto.plot(chosen, "voc21", "latency", tmp_path / "plot.pdf")


def test_no_label_lies_on_another(tmp_path, monkeypatch):
    placed = []
    place = pareto._place_labels

    def watch(axes, chosen):
        place(axes, chosen)
        renderer = axes.figure.canvas.get_renderer()
        placed.extend(pareto._text_box(text, renderer) for text in axes.texts)

    monkeypatch.setattr(pareto, "_place_labels", watch)
    random = np.random.default_rng(1)
    chosen = [
        pareto.Point(str(i), f"a-method-{i}", 30 + float(random.normal(0, 2)), 50 + float(random.normal(0, 2)))
        for i in range(14)
    ]  # a cluster
    pareto.plot(chosen, "voc21", "latency", tmp_path / "plot.png")
    assert len(placed) == 14
    assert [pareto._overlap(a, b) for i, a in enumerate(placed) for b in placed[:i]] == [0.0] * (14 * 13 // 2)


def test_an_svg_has_no_date(tmp_path):
    pareto.plot(_points((1, 2), (3, 4)), "voc21", "latency", tmp_path / "plot.svg")
    assert not re.search(r"\d{4}-\d\d-\d\dT", (tmp_path / "plot.svg").read_text())
