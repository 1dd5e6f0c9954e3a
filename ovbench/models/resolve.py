"""From a method's name, its weights and the user's options to the constants in force; fetches and builds nothing.

Where the weights are a file that a training of ovbench left, its header has a say: which method it is of, and with which
options it was trained; a public checkpoint of mmseg's is recognised by what is in it. What a run will record of its method can
therefore be foretold from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ovbench.errors import WeightsError
from ovbench.models.public_file import PublicFile
from ovbench.models.trained_file import About, options_again, read_about, require_method, training_facts
from ovbench.paths import user_path
from ovbench.registry import MethodInfo, class_of, method_info


@dataclass(frozen=True)
class Resolved:
    """A method and its constants.

    Attributes:
        info: What is known of the method by name.
        cls: Its class.
        config: Its constants: defaults, then a trained file's, then the user's.
        about: What the trained file says of itself; None for other weights.
        public: What a public checkpoint is of; None for other weights.
    """

    info: MethodInfo
    cls: type[Any]
    config: Any
    about: About | None
    public: PublicFile | None = None

    @property
    def class_names(self) -> list[str] | None:
        """The classes that the weights say they were trained on, in label order; None where they say nothing."""
        told = self.about or self.public
        return None if told is None or told.class_names is None else list(told.class_names)

    @property
    def dataset(self) -> str | None:
        """The benchmark that the weights say they were trained on."""
        told = self.about or self.public
        return None if told is None else told.dataset

    @property
    def demo(self) -> bool:
        """Whether the weights were trained on generated scenes."""
        return self.about is not None and self.about.demo

    def recorded(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What a record says as ``method_options``: the options in force, the source of foreign code, the training."""
        return {**options, **self.info.recorded(), **training_facts(self.about)}

    def chosen(self) -> dict[str, Any]:
        """The constants that are not the class's own defaults: given as options, they make the same config."""
        defaults = asdict(self.cls.Config())
        changed = {name: value for name, value in asdict(self.config).items() if value != defaults[name]}
        of_base = changed.pop("base_options", ())  # of a method on top of another
        return {**changed, **{f"base.{name}": value for name, value in of_base}}

    def trial(self) -> str | None:
        """Why weights are no result of their recipe; None where they are."""
        about = self.about
        if about is None or about.iterations >= about.planned:
            return None
        return f"weights of a trial: {about.iterations} of {about.planned} iterations were trained"


def resolve(method: str, weights: str, options: Mapping[str, Any], *, demo: bool = False) -> Resolved:
    """The method with its constants.

    Args:
        method: Method id, or ``PATH.py:Class``.
        weights: Tag, file, ``random`` or ``builtin``.
        options: The user's.
        demo: Take what needs no download.

    Raises:
        UsageError: Unknown method or option.
        WeightsError: The file is of another method, or it fixes an option that the user wants otherwise.
    """
    cls = class_of(method)
    info = method_info(method)  # after the class: a file of the user's own may have been edited meanwhile
    path = user_path(weights)
    about = read_about(path) if path.is_file() else None
    public = cls.public_file(path) if about is None and path.is_file() else None
    if about is not None:
        require_method(about, info.name)
        trained = options_again(about.method_options, cls)
    elif public is not None:
        public.require_method(info.name)
        trained = dict(public.options)
    else:
        return Resolved(info, cls, cls.configure_for(dict(options), weights=weights, demo=demo), None)
    config = cls.configure_for({**trained, **options}, weights=weights, demo=demo)
    if cls.FIXED_BY_TRAINING:
        before = asdict(cls.configure_for(trained, weights=weights, demo=demo))
        for key, value in asdict(config).items():
            if value != before[key]:
                raise WeightsError(f"The weights were trained with {key}={before[key]}: leave '-o {key}={value}' away.")
    return Resolved(info, cls, config, about, public)
