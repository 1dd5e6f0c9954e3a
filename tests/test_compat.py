"""The stand-ins that let mmsegmentation run; in fresh processes, because they change what a process can import."""

from __future__ import annotations

import json
import textwrap

import pytest


def _run(run_python, code: str, *flags: str):
    done = run_python(*flags, "-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    return done


def test_prepare_makes_mmseg_importable_and_silent(run_python):
    done = _run(
        run_python,
        """
        from ovbench.mm.compat import import_mmseg, prepare
        prepare()
        prepare()
        mmseg = import_mmseg()
        from mmengine.registry import init_default_scope
        from mmengine.utils.dl_utils.misc import mmcv_full_available
        from mmseg.registry import DATASETS, METRICS, MODELS
        init_default_scope("mmseg")
        import torch
        head = MODELS.build(dict(type="FCNHead", in_channels=8, channels=4, num_classes=3, in_index=0, num_convs=1)).eval()
        print(head([torch.zeros(1, 8, 6, 5)]).shape[1:] == (3, 6, 5))
        print("PascalVOCDataset" in DATASETS, "IoUMetric" in METRICS, mmcv_full_available(), mmseg.__version__)
        """,
    )
    assert done.stdout.split("\n")[:2] == ["True", "True True False 1.2.2"]
    assert done.stderr == ""


def test_a_compiled_operator_names_itself_only_when_it_is_called(run_python):
    done = _run(
        run_python,
        """
        from ovbench.mm.compat import prepare
        from ovbench.errors import RunError
        prepare()
        import importlib, inspect, torch
        extension = importlib.import_module("mmcv._ext")
        from mmcv.ops import nms, point_sample
        # Written in Python: works. The middle of a 2x2 map is the mean of its values.
        grid = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
        print(point_sample(grid, torch.tensor([[[0.5, 0.5]]])).item())
        try:
            nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
        except RunError as error:
            print(error)
        print(hasattr(extension, "__wrapped__"), inspect.getmodule(extension) is extension)
        """,
    )
    value, message, probes = done.stdout.strip().split("\n")
    assert float(value) == 1.5
    assert "'nms'" in message and "mmcv-lite" in message
    assert probes == "False True"


def test_a_real_extension_is_left_alone(run_python, tmp_path):
    package = tmp_path / "mmcv"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_ext.py").write_text("real = True\n")
    code = (
        "from ovbench.mm.compat import _supply_extension; _supply_extension(); import mmcv._ext; print(mmcv._ext.real)"
    )
    done = run_python("-c", code, PYTHONPATH=str(tmp_path))
    assert done.stdout.strip() == "True", done.stderr


def test_without_pkg_resources_and_distutils(run_python):
    """As with Python 3.12 and a setuptools that has neither."""
    done = _run(
        run_python,
        """
        import sys
        class Hidden:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("pkg_resources", "distutils", "setuptools"):
                    raise ModuleNotFoundError(name, name=name)
        import importlib.util
        original = importlib.util.find_spec
        hidden = ("pkg_resources", "distutils")
        importlib.util.find_spec = lambda name, package=None: None if name in hidden else original(name, package)
        for name in [n for n in sys.modules if n.partition(".")[0] in ("pkg_resources", "distutils", "_distutils_hack")]:
            del sys.modules[name]
        sys.meta_path.insert(0, Hidden())

        from ovbench.mm.compat import prepare
        prepare()
        import mmengine.config.config as config
        from mmengine.utils.dl_utils import collect_env
        print(config.is_installed("mmsegmentation"), config.is_installed("mmseg"), config.is_installed("no-such"))
        print(config.get_installed_path("mmseg") == config.get_installed_path("mmsegmentation"))
        try:
            config.get_installed_path("no-such")
        except Exception as error:
            print(type(error).__name__)
        print("Python" in collect_env())
        """,
    )
    assert done.stdout.split("\n")[:4] == ["True True False", "True", "PackageNotFoundError", "True"]


def test_a_base_config_of_mmseg_can_be_named(run_python, tmp_path):
    """mmengine finds ``mmseg::...`` through the package lookups that are replaced."""
    (tmp_path / "config.py").write_text("_base_ = 'mmseg::_base_/models/fcn_unet_s5-d16.py'\n")
    done = _run(
        run_python,
        f"""
        from ovbench.mm.compat import prepare
        prepare()
        from mmengine.config import Config
        print(Config.fromfile({str(tmp_path / "config.py")!r}).model.type)
        """,
    )
    assert done.stdout.strip() == "EncoderDecoder"


def test_only_known_warnings_are_silenced(run_python):
    done = _run(
        run_python,
        """
        import sys, types, warnings
        from ovbench.mm.compat import prepare
        prepare()
        def warn_from(module, text, category):
            warnings.warn_explicit(text, category, module + ".py", 1, module=module)
        with warnings.catch_warnings(record=True) as seen:
            warnings.filterwarnings("default")  # lowest priority is what a user has; ours must come first
            prepare()
            meshgrid = "torch.meshgrid: in an upcoming release, it will be required to pass the indexing argument."
            warn_from("torch.functional", meshgrid, UserWarning)
            warn_from("users_code", meshgrid, UserWarning)
            warn_from("torch.functional", "something else", UserWarning)
            warn_from("mmseg.models.losses.cross_entropy_loss", "Default ``avg_non_ignore`` is False, ...", UserWarning)
        import json
        print(json.dumps([[str(w.message), w.filename] for w in seen]))
        """,
    )
    seen = json.loads(done.stdout)
    assert [name for _, name in seen] == ["users_code.py", "torch.functional.py"]
    assert seen[1][0] == "something else"


def test_a_missing_mmcv_says_what_to_install(monkeypatch):
    import importlib.util

    from ovbench.errors import RunError
    from ovbench.mm import compat

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None if name == "mmcv" else real(name))
    with pytest.raises(RunError, match=r"'mmcv' is not installed.*mmcv-lite"):
        compat.has_compiled_ops()


def test_import_names_what_is_broken(monkeypatch):
    from ovbench.errors import RunError
    from ovbench.mm import compat

    def broken(name: str):
        raise AssertionError("MMCV==2.2.0 is used but incompatible")

    monkeypatch.setattr(compat, "prepare", lambda: None)
    monkeypatch.setattr(compat.importlib, "import_module", broken)
    with pytest.raises(RunError, match=r"MMCV==2.2.0 .*mmcv-lite 2.1"):
        compat.import_mmseg()


def test_python_3_14_is_refused(monkeypatch):
    from ovbench.errors import RunError
    from ovbench.mm import compat

    monkeypatch.setattr(compat.sys, "version_info", (3, 14, 0))
    with pytest.raises(RunError, match=r"Use Python 3\.10 to 3\.13"):
        compat.prepare()
