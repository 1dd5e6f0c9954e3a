"""What a mask-based method is: a frozen generator cuts an image into masks, and the method says what is in each.

Where images come from, how masks become label maps and segments, and timing live once, in :mod:`ovbench.models.mask_model`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ovbench.errors import UsageError, WeightsError, unknown_name
from ovbench.hashing import sha256_of_file
from ovbench.models.method import Method
from ovbench.networks.clip_weights import from_openai_format, load_clip, load_strictly
from ovbench.networks.dense_clip import DenseCLIP
from ovbench.networks.mask_generators.cache import CachedGenerator, proposals_dir
from ovbench.networks.mask_generators.generator import MaskGenerator
from ovbench.networks.mask_generators.load import MASK2FORMERS, generator_names, load_generator
from ovbench.networks.state_dict import read_state_dict, require_finite
from ovbench.ops.mask_losses import LossWeights, mask_losses, match, without_crowds
from ovbench.ops.masks import padded
from ovbench.ops.panoptic import Segments, segments_of_labels
from ovbench.paths import user_path
from ovbench.words.embeddings import embed_words
from ovbench.words.prompts import Prompts

if TYPE_CHECKING:
    from typing import TypeAlias

    from ovbench.networks.convnext_clip import ConvNextCLIP

    Encoder: TypeAlias = DenseCLIP | ConvNextCLIP

CLASSIFIERS = ("own", "oracle")


# Looked at for what is inferred: FISA's paper, the public MaskCLIP, FC-CLIP and ODISE.
@dataclass(frozen=True)
class MaskConfig:
    """Switches that all mask-based methods share."""

    generator: str = (
        "mask2former-swin-b"  # FISA: Swin-B, trained on COCO panoptic; 'oracle' is its Fig. 2's upper bound
    )
    generator_weights: str | None = None  # None: the published ones
    classifier: str = "own"  # 'oracle': each mask has the class of the true segment that it overlaps most (Fig. 2)
    generator_path: str | None = None  # of 'files': the folder or file with one's own masks
    objectness: bool = False  # times the generator's probability of an object; inferred: its labels "are not used"
    masks: int = 100  # masks per image that the cost is measured with; no method looks at it


class Words(NamedTuple):
    """The vocabulary that masks are classified with.

    Attributes:
        text: Embeddings (Q, D), float32, L2-normalised.
        word_class: Class of each word (Q,), int64.
        classes: K.
        logit_scale: Factor on cosines: 1 / temperature.
        seen: Classes of which the weights were trained with a word (K,), bool; see :func:`seen_classes`.
    """

    text: Tensor
    word_class: Tensor
    classes: int
    logit_scale: float
    seen: Tensor

    def best(self, logits: Tensor) -> Tensor:
        """Logits of the classes (..., K), each its best word's, from logits of the words (..., Q)."""
        if logits.shape[-1] == self.classes:
            return logits
        classes = logits.new_full((*logits.shape[:-1], self.classes), float("-inf"))
        return classes.scatter_reduce(-1, self.word_class.expand_as(logits), logits, "amax")


class Classified(NamedTuple):
    """What a method says of the masks of some images.

    Attributes:
        logits: Of the words (B, M, Q), or of the classes (B, M, K) where a method combines those itself; float32, scaled: the
            softmax over the classes' best words are probabilities.
        masks: Logits of the masks (B, M, h, w), where the method corrects them.
        embeddings: Of the masks (B, M, D), float32, not normalised; None where a method has none.
    """

    logits: Tensor
    masks: Tensor
    embeddings: Tensor | None = None


class MaskMethod(Method):
    """Base of all mask-based methods: override :meth:`classify`.

    Class attributes:
        LOSS: Weights of the losses.
        POS_INTERP: How position embeddings are resized in training; in evaluation the protocol says it.
        PAD_COLOUR: RGB 0..255 of what the protocol pads images with; None is CLIP's mean.

    Args:
        clip: The CLIP.
        config: Switches; a :class:`MaskConfig`.
        seed: Of random weights.

    Raises:
        UsageError: Unknown generator, or its package is missing.
        WeightsError: Its weights cannot be had or do not fit.
    """

    Config = MaskConfig
    MODEL: ClassVar[str] = "ovbench.models.mask_model:MaskModel"
    OFFLINE_OPTIONS: ClassVar[dict[str, Any]] = {"generator": "grid"}
    LOSS: ClassVar[LossWeights] = LossWeights()
    POS_INTERP: ClassVar[Literal["size", "bilinear"]] = "size"
    PAD_COLOUR: ClassVar[tuple[float, float, float] | None] = None
    takes_segments: ClassVar[bool] = True  # losses are taken on true segments where the data has them
    FROZEN: ClassVar[tuple[str, ...]] = ("generator.",)

    def __init__(self, clip: Encoder, config: Any = None, *, seed: int = 0) -> None:
        super().__init__(clip, config)  # type: ignore[arg-type]  # of a ConvNeXt the dense surface is another
        c = self.config
        if c.classifier not in CLASSIFIERS:
            raise unknown_name("classifier", c.classifier, CLASSIFIERS)
        if c.generator not in generator_names():
            raise unknown_name("mask generator", c.generator, generator_names())
        # a profile asks for random weights of all backbones; what has none keeps none
        own = None if c.generator_weights == "random" and c.generator not in MASK2FORMERS else c.generator_weights
        self.generator: MaskGenerator = load_generator(
            c.generator, own, path=c.generator_path, seed=seed, device=str(clip.mean.device)
        )
        self.seen_words: frozenset[str] = frozenset()
        self._training: Words | None = None
        self.policy: str | None = None

    @classmethod
    def build(cls, clip: DenseCLIP, options: dict[str, Any] | None = None) -> MaskMethod:
        """The method on a loaded CLIP with the user's options."""
        return cls(clip, cls.configure(options or {}))

    @classmethod
    def configure(cls, options: dict[str, Any]) -> Any:
        """As the base's; says where what was an option before has gone."""
        for name in options:
            if name.replace("-", "_") in ("object_thd", "overlap_thd"):
                raise UsageError(
                    f"{name} is a field of the protocol: --{name.replace('_', '-')} in place of an option."
                )
        return super().configure(options)

    @classmethod
    def load(
        cls,
        weights: str,
        arch: str | None = None,
        config: Any = None,
        *,
        activation: Any = "auto",
        seed: int = 0,
        device: str = "cpu",
        training: bool = False,
    ) -> MaskMethod:
        """The method with CLIP's weights, or with those that a training of ours left.

        Untrained, a method is its baseline (see the methods), so CLIP's weights alone will do.

        Args:
            weights: As of :func:`ovbench.networks.clip_weights.load_clip`, or a trained file.
            arch: open_clip architecture where the weights are CLIP's.
            config: Switches.
            activation: ``auto``, ``gelu`` or ``quickgelu``.
            seed: Of random weights.
            device: Torch device.
            training: No difference.

        Raises:
            UsageError, WeightsError: As of ``load_clip``; or the file is of another network.
        """
        from open_clip import list_models

        from ovbench.models.trained_file import read_about

        config = cls.Config() if config is None else config
        path = user_path(weights)
        about = read_about(path) if path.is_file() else None
        if about is None:
            return cls(load_encoder(weights, arch, activation=activation, seed=seed, device=device), config, seed=seed)
        state, digest = read_state_dict(path), sha256_of_file(path)
        own = {key.removeprefix(_CLIP): value for key, value in state.items() if key.startswith(_CLIP)}
        trained_with = about.method_options.get("clip_activation", "quickgelu")
        if about.arch in list_models():  # shapes tell no number of heads: ViT-H-14's are 80 wide, EVA01-g-14's 88
            clip: Any = load_encoder("random", about.arch, activation=trained_with, seed=seed)
            load_strictly(clip.clip, own, str(path), about.arch)
            clip.weights, clip.weights_sha256 = str(path), digest
        else:
            quick = trained_with != "gelu"
            clip = from_openai_format(own, str(path), digest, arch=about.arch, quick=quick, path=path)
        method = cls(clip, config, seed=seed)
        method._fill({key: value for key, value in state.items() if not key.startswith(_CLIP)}, str(path))
        method.seen_words = single_words(about.words or about.class_names)
        return method.to(device)

    def _fill(self, state: dict[str, Tensor], name: str) -> None:
        """Parameters that are not CLIP's, from a trained file.

        Raises:
            WeightsError: Missing, unknown or of another shape.
        """
        expected = {
            key: value for key, value in self.state_dict().items() if not key.startswith(("clip.", *self.FROZEN))
        }
        trained = {key: value for key, value in state.items() if not key.startswith(self.FROZEN)}
        wrong = sorted(set(expected) ^ set(trained))
        wrong += [key for key in expected if key in trained and expected[key].shape != trained[key].shape]
        if wrong:
            raise WeightsError(
                f"'{name}' does not fit {type(self).__name__} with these options (first of {len(wrong)}: {wrong[0]}): give "
                "the options that it was trained with."
            )
        tuned = {key: value for key, value in state.items() if key.startswith(self.FROZEN)}
        own = self.state_dict()
        if any(key not in own or own[key].shape != value.shape for key, value in tuned.items()):
            raise WeightsError(
                f"'{name}' holds a trained mask generator of another kind: give the one it was trained with."
            )
        require_finite(state.items(), name)
        self.load_state_dict({key: value.float() for key, value in state.items()}, strict=False)
        if tuned:
            self.generator.weights_sha256 = sha256_of_file(user_path(name))

    def public_state(self) -> dict[str, Tensor]:
        """All weights but the generator's (unless those are trained), which :meth:`load` takes."""
        towers = self.clip.public_state() if isinstance(self.clip, DenseCLIP) else self.clip.clip.state_dict()
        own = {key: value for key, value in self.state_dict().items() if not key.startswith(("clip.", *self.FROZEN))}
        inner = {_CLIP + key: value for key, value in towers.items() if not key.endswith("attn_mask")}
        extra = {f"generator.{key}": value for key, value in self.generator.state_dict().items()}
        return {**inner, **own, **(extra if self.trains_generator else {})}

    def cache_proposals(self, limit: int) -> None:
        """Keep the generator's proposals in the user's cache from now on, in at most ``limit`` bytes."""
        if self.generator.needs_names:
            raise UsageError("The masks of the generator 'files' are on disk already: leave --cache-masks away.")
        self.generator = CachedGenerator(self.generator, proposals_dir(), limit)

    def options(self) -> dict[str, Any]:
        """Switches in force, and what generator and CLIP are."""
        found = {"generator_identity": self.generator.identity(), "clip_activation": self.clip.activation}
        if self.config.generator_path is not None:  # where files lie is no part of a run; the identity is their content
            found["generator_path"] = user_path(self.config.generator_path).name
        return {**asdict(self.config), **found}

    def classify(self, images: Tensor, masks: Tensor, words: Words) -> Classified:
        """What each mask shows.

        Args:
            images: Normalised images (B, 3, H, W).
            masks: Logits (B, M, h, w), at any size that spans the images.
            words: The vocabulary.
        """
        raise NotImplementedError

    def patch_logits(self, images: Tensor, text: Tensor) -> Tensor:
        """Raises ``UsageError``: there are logits of masks, not of patches."""
        raise UsageError("A mask-based method has no logits of patches: solvers and dense bases need another method.")

    def features(self, images: Tensor) -> Tensor:
        """Raises ``UsageError``: what is compared with the words are masks."""
        raise UsageError("A mask-based method has no dense features: choose another method, e.g. maskclip.")

    def set_training_classes(self, words: Sequence[str], prompts: Prompts) -> None:
        """The vocabulary that :meth:`losses` is taken on."""
        text = embed_words(self.clip, list(words), prompts).clone()  # made in inference mode, which gradients refuse
        self.clip.pos_interp = self.POS_INTERP  # as the method's own protocol has it
        owner = torch.arange(len(words), device=text.device)
        self._training = Words(text, owner, len(words), self.training_scale, torch.ones_like(owner, dtype=torch.bool))

    @property
    def training_scale(self) -> float:
        """1 / temperature of the training's cosines."""
        return 100.0

    def losses(self, images: Tensor, labels: Tensor, segments: Sequence[Segments] | None = None) -> dict[str, Tensor]:
        """Losses by name, in training mode.

        Args:
            images: (B, 3, H, W), RGB 0..255.
            labels: (B, H, W), int64, 255 ignored.
            segments: True segments of each image; None makes one of each class that a label shows.

        Raises:
            UsageError: :meth:`set_training_classes` was not called.
        """
        if self._training is None:
            raise UsageError("Say which classes are trained first: set_training_classes().")
        if segments is not None:
            truth = [without_crowds(own.to(labels.device)) for own in segments]
        else:
            truth = [segments_of_labels(label, self._training.classes) for label in labels]
        proposals = self.propose(images, truth)
        found = self.classify(self.training_input(images), proposals, self._training)
        total: dict[str, Tensor] = {}
        for row, own in enumerate(truth):
            chosen = match(found.masks[row], found.logits[row], own, self.LOSS)
            for name, value in mask_losses(found.masks[row], found.logits[row], own, chosen, self.LOSS).items():
                total[name] = total.get(name, torch.zeros((), device=value.device)) + value / len(truth)
        return total

    def training_input(self, images: Tensor) -> Tensor:
        """Crops (B, 3, S, S), RGB 0..255, as :meth:`classify` wants them: normalised, of whole patches."""
        size = whole_patches((images.shape[-2], images.shape[-1]), self.clip.patch)
        if tuple(images.shape[-2:]) != size:
            images = F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False)
        return self.clip.normalise(images)

    def propose(self, images: Tensor, truth: Sequence[Segments]) -> Tensor:
        """Masks (B, M, h, w) of crops (B, 3, H, W), RGB 0..255, with gradients only where the generator is trained."""
        pictures = images.to(torch.uint8)
        if self.generator.needs_names:
            raise UsageError(
                "The generator 'files' has masks of whole images, not of training crops: train with another."
            )
        known = [own.ids for own in truth] if self.generator.needs_truth else []
        if self.trains_generator:
            masks = [found.masks for found in self.generator.propose_same_size(pictures, known)]
        else:
            masks = [found.masks for found in self.generator.propose(list(pictures), known or None)]
        return padded(masks, max([1, *map(len, masks)]))

    @property
    def trains_generator(self) -> bool:
        """Whether the policy in force trains the generator."""
        return self.policy is not None and "generator" in self.policy

    def parameter_groups(self, policy: str | None = None) -> list[dict[str, Any]]:
        """What a policy trains: dicts with ``name``, ``params`` (names), ``lr_mult`` and ``weight_decay_mult``.

        Raises:
            UsageError: Unknown policy.
        """
        chosen = policy or (self.POLICIES[0] if self.POLICIES else "")
        if chosen not in self.POLICIES:
            raise unknown_name("trainable-parameter policy", chosen, self.POLICIES)
        self.policy = chosen
        if self.trains_generator:
            self.FROZEN = ()  # type: ignore[misc]  # of this network a checkpoint holds the generator as well
        norms = {f"{name}.{key}" for name, module in self.named_modules() if isinstance(module, torch.nn.LayerNorm)
                 for key, _ in module.named_parameters()}  # fmt: skip
        return [  # norms do not decay, as in Mask2Former's and MaskCLIP's code
            {"name": name, "params": params, "lr_mult": lr, "weight_decay_mult": 1.0,
             "undecayed": [parameter for parameter in params if parameter in norms]}
            for name, params, lr in self.trained(chosen)
            if params
        ]  # fmt: skip

    def trained(self, policy: str) -> list[tuple[str, list[str], float]]:
        """Name, parameters and factor on the learning rate of each part that a policy trains."""
        raise NotImplementedError

    def named(self, *beginnings: str) -> list[str]:
        """Names of the parameters that begin so."""
        return [name for name, _ in self.named_parameters() if name.startswith(beginnings)]


def whole_patches(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """The nearest size (h, w) in pixels that whole patches cover, so that masks and patches span the same image."""
    return max(1, round(size[0] / patch)) * patch, max(1, round(size[1] / patch)) * patch


def single_words(names: Iterable[str]) -> frozenset[str]:
    """The words of a vocabulary as FC-CLIP's public code takes them: names cut at commas, by exact string.

    Of "bus, coach" these are "bus" and "coach"; "Dog" is another word than "dog".
    """
    return frozenset(word for name in names for word in name.replace(", ", ",").split(","))


def seen_classes(words: Sequence[Sequence[str]], trained: Iterable[str]) -> list[bool]:
    """Whether each class (its words) shares a word with the names that weights were trained with."""
    known = single_words(trained)
    return [not known.isdisjoint(single_words(entry)) for entry in words]


def load_encoder(
    weights: str, arch: str | None, *, activation: Any = "auto", seed: int = 0, device: str = "cpu"
) -> Encoder:
    """The CLIP that ``--weights`` and ``--arch`` name: a ConvNeXt where the architecture is one, else a ViT."""
    if arch is not None and arch.startswith("convnext"):
        from ovbench.networks.convnext_clip import load_convnext_clip

        return load_convnext_clip(weights, arch, activation=activation, seed=seed, device=device)
    return load_clip(weights, arch, activation=activation, seed=seed, device=device)


_CLIP = "clip_model."  # begins CLIP's own weights in a trained file
