"""Constants by backbone: which are in force, what is said of them, and that tables and foretelling know the same."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import pytest
from safetensors.torch import save_file
from short_runs import spec as short_spec
from tiny_clip import save_tiny, tiny_state

import ovbench
from ovbench.errors import OvbenchWarning
from ovbench.models.backbone_constants import Backbone, backbone_named, constants_of
from ovbench.models.method import Method
from ovbench.networks.clip_weights import load_clip
from ovbench.networks.dense_clip import DenseCLIP
from ovbench.registry import method_class, method_names
from ovbench.tables.method_defaults import changed_options, inferred_constants

OLD_L14 = {"pre": 8, "post": 3, "multi_first": 3, "multi_last": 9, "cls_weight": 0.3, "scale_indices": True}
NEW_L14 = {"pre": 16, "post": 6, "multi_first": 8, "multi_last": 18, "cls_weight": 0.1, "scale_indices": False}


def save(path: Path, layers: int, patch: int) -> str:
    state = tiny_state(layers=layers, patch=patch, grid=4)
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return str(path)


@pytest.fixture(scope="module")
def l14(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("weights") / "l14.safetensors", 24, 14)


def build(name: str, clip: DenseCLIP, **options: Any) -> Method:
    cls = method_class(name)
    return cls.build(clip, {**cls.OFFLINE_OPTIONS, **options})


def test_names_tell_depth_and_patch() -> None:
    seen = 0
    for name in open_clip.list_models():
        vision = open_clip.get_model_config(name)["vision_cfg"]
        if isinstance(vision.get("layers"), int) and "patch_size" in vision and name.startswith("ViT-"):
            assert backbone_named(name) == (vision["layers"], vision["patch_size"]), name
            seen += 1
    assert seen > 30
    for name, expected in {
        "ViT-L/14-336": (24, 14), "EVA01-g-14-plus": (40, 14), "openai-format-ViT-32x1280-14-16heads": (32, 14),
        "builtin-ViT-12x128": (12, 16), "hf-hub:someone/small": None, "convnext_large_d_320": None, None: None,
        "ViT-SO400M-14-SigLIP": None,
    }.items():  # fmt: skip
        assert backbone_named(name) == expected, name


def test_every_table_is_whole() -> None:
    """All entries set the same fields, which default to None, and say where they are from."""
    tables = 0
    for name in method_names(None):
        cls = method_class(name) if name in method_names() else None
        if cls is None or not cls.BACKBONES:
            continue
        tables += 1
        assert all(backbone_named(own) is not None and entry["source"] for own, entry in cls.BACKBONES.items()), name
        [names] = {tuple(sorted(entry["values"])) for entry in cls.BACKBONES.values()}
        assert all(getattr(cls.Config(), field) is None for field in names), name
    assert tables >= 5


def test_sc_clip_has_its_authors_constants_on_l14(l14: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method = build("sc-clip", load_clip(l14))
    options = method.options()
    assert {name: options[name] for name in NEW_L14} == NEW_L14
    assert options["blocks_used"] == {"pre": 16, "post": 6, "multi": [8, 18]} and not options["blocks_inferred"]
    assert method.constants == "published for ViT-L/14 (its author, issue 5 of SuleBai/SC-CLIP)"


def test_what_the_user_sets_wins(l14: str) -> None:
    clip = load_clip(l14)
    options = build("sc-clip", clip, pre="8", cls_weight="0.3").options()
    assert options["blocks_used"] == {"pre": 8, "post": 6, "multi": [8, 18]} and options["cls_weight"] == 0.3
    # a record of the time before is repeated as it was, and a new one too
    assert build("sc-clip", clip, **OLD_L14).options()["blocks_used"] == {"pre": 16, "post": 6, "multi": [6, 18]}
    again = build("sc-clip", clip, **NEW_L14).options()
    assert again == build("sc-clip", clip).options()


def test_b16_says_what_it_always_said(tmp_path: Path) -> None:
    method = build("sc-clip", load_clip(str(save_tiny(tmp_path / "tiny.safetensors"))))
    assert method.options() == {
        "neighbours": 30, "contamination": 0.05, "beta": 0.4, "pre": 8, "post": 3, "multi_first": 3, "multi_last": 9,
        "sharpness": 3.0, "cls_weight": 0.3, "scale_indices": True,
        "blocks_used": {"pre": 8, "post": 3, "multi": [3, 9]}, "blocks_inferred": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "layers", "patch", "told"),
    [
        ("naclip", 24, 14, r"inferred for this backbone \(24 blocks, patch 14\): published for ViT-B/16; those of ViT-B/16"),
        ("sc-clip", 32, 14, r"published for ViT-B/16, ViT-L/14; those of ViT-B/16 are used, with block indices scaled by"),
        ("sc-clip", 12, 32, r"inferred .*12 blocks, patch 32.*those of ViT-B/16 are used$"),
        ("cat-seg", 32, 14, r"those of ViT-B/16 are used, the decoder is guided by blocks at a third"),
        ("discrepancy-op", 24, 14, r"inferred for this backbone .*those of ViT-B/16 are used$"),
        ("proxyclip", 24, 14, None), ("cat-seg", 24, 14, None), ("naclip", 12, 16, None),
        ("clearclip", 24, 14, ""), ("sclip", 24, 14, ""), ("clip", 24, 14, ""), ("kk", 24, 14, ""),
    ],
)  # fmt: skip
def test_what_is_said_loudly(name: str, layers: int, patch: int, told: str | None, tmp_path: Path) -> None:
    clip = load_clip(save(tmp_path / "tiny.safetensors", layers, patch))
    options = {"base": "naclip"} if name.startswith("discrepancy") else {}
    if told:
        with pytest.warns(OvbenchWarning, match="inferred for this backbone"):
            method = build(name, clip, **options)
        assert method.constants is not None
        assert re.search(told, method.constants), method.constants
        assert inferred_constants(name, options, clip.arch) == f"constants {method.constants}"  # read as text
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method = build(name, clip, **options)
    assert (method.constants or "").startswith("published for ViT" if told is None else "")
    assert inferred_constants(name, options, clip.arch) is None


def test_tables_know_the_constants_of_a_backbone() -> None:
    assert changed_options("sc-clip", NEW_L14, "ViT-L-14-quickgelu") == {}
    assert set(changed_options("sc-clip", OLD_L14, "ViT-L-14") or ()) == set(NEW_L14)
    assert changed_options("sc-clip", OLD_L14, "ViT-B-16") == {} == changed_options("sc-clip", OLD_L14, "ViT-H-14")
    assert set(changed_options("sc-clip", NEW_L14, "ViT-B-16") or ()) == set(NEW_L14)
    assert changed_options("sc-clip", NEW_L14, None) == {}  # of an unknown one, those of any
    based = {"base": "sc-clip", **{f"base.{name}": value for name, value in NEW_L14.items()}}
    assert changed_options("discrepancy-op", based, "ViT-L/14") == {"base": "sc-clip"}
    assert "base.pre" in (changed_options("discrepancy-op", based, "ViT-B/16") or {})


@pytest.mark.parametrize("name", method_names())
@pytest.mark.parametrize("backbone", [Backbone(12, 16), Backbone(24, 14)])
def test_text_and_class_say_the_same(name: str, backbone: Backbone) -> None:
    from ovbench.models.backbone_constants import in_force

    cls = method_class(name)
    config = cls.configure({})
    if cls.BACKBONES:
        config = in_force(config, constants_of(cls.BACKBONES, backbone))
    own = json.loads(json.dumps(asdict(config)))
    assert changed_options(name, own, {12: "ViT-B-16", 24: "ViT-L-14"}[backbone.depth]) == {}


def test_a_run_records_and_foretells_them(l14: str, tmp_path: Path) -> None:
    from ovbench.benchmarks.synth.copies import synth
    from ovbench.evaluate.expected import expected
    from ovbench.spec import RunSpec, validated

    root = synth("voc21", tmp_path / "data", images=1, size=(64, 80))
    records = {}
    for method in ("sc-clip", "naclip"):
        spec = validated(RunSpec, short_spec(l14, method=method, limit=1))
        known = expected(spec, root)
        assert known.certain
        found = ovbench.run(spec, data_root=root, results=tmp_path / "runs", gallery=0, workers=0)
        records[method] = found.model_copy(update={"partial": False, "reason": None, "status": "ok"})
        assert known.is_of(found)
    assert records["sc-clip"].constants == "published for ViT-L/14 (its author, issue 5 of SuleBai/SC-CLIP)"
    assert records["naclip"].constants.startswith("inferred for this backbone (24 blocks, patch 14)")
    old = {**records["sc-clip"].spec.method_options, **OLD_L14, "blocks_inferred": True}
    before = records["sc-clip"].model_copy(
        update={"spec": records["sc-clip"].spec.model_copy(update={"method_options": old})}
    )
    assert not expected(validated(RunSpec, short_spec(l14, method="sc-clip", limit=1)), root).is_of(before)
    assert before.spec.spec_hash() != records["sc-clip"].spec.spec_hash()


def test_paper_tables_take_the_right_run(make_record: Callable[..., Any]) -> None:
    from ovbench.results.measured import of_record
    from ovbench.tables.paper import arrange

    def row(method: str, label: str, options: dict[str, Any]) -> Any:
        made = make_record(spec={"arch": "ViT-L-14", "method": method, "method_options": options, "protocol": method})
        section = arrange("direct-seg", "1", [of_record(made)], None).sections[0]
        for found in section.rows:
            if {"SC-CLIP" if label == "sc" else "NACLIP", "ViT-L/14"} <= set(found.settings):
                return next(
                    cell for column, cell in zip(section.columns, found.cells, strict=True) if column.dataset == "voc21"
                )
        raise AssertionError(section.rows)

    assert row("sc-clip", "sc", NEW_L14).value is not None
    assert row("sc-clip", "sc", OLD_L14).value is None
    remarks = row("naclip", "na", {"sigma": 5.0, "residual": False}).remarks
    assert any("constants inferred for this backbone" in remark for remark in remarks), remarks
