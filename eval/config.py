"""The `eval` section of a YAML: what is measured, with which features, on how many images."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.config import TrainConfig

VARIANT_NAME = re.compile(r"(?!accept|step)[A-Za-z0-9][\w.+-]*")
REPRESENTATIONS = {  # what begins the name of a tap, and the subject of its scores
    "pixels": "pixels",
    "tokenizer": "tokenizer",
    "vim": "autoregressive",
    "vim_random": "autoregressive_random",
    "dit": "diffusion",
}


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    path: str | None = None
    """Folder of a trained classifier, so that several runs share one judge; absent: one is trained into the run."""
    widths: tuple[int, int, int] = (32, 64, 96)
    """Channels at 1/2, 1/4 and 1/8 of the image size; multiples of 8."""
    shift: int = 2
    """Training images are moved by up to so many pixels."""
    seed: int = 0
    """Seed of weights and data order; apart from run.seed, so that runs with other seeds have the same judge."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=300, learning_rate=2e-3, weight_decay=0.02, warmup_steps=20, ema=0.98, log_every=100, preview_every=0
        )
    )
    """How the classifier is trained."""

    def __post_init__(self) -> None:
        if any(width < 8 or width % 8 for width in self.widths):
            raise ValueError(f"classifier.widths={list(self.widths)} must be multiples of 8")


@dataclass(frozen=True, kw_only=True)
class RejectionConfig:
    acceptances: tuple[float, ...] = ()
    """Also score the best share of candidates of each class, once for each share listed; 0.5 and 0.25 are usual.
    All candidates stay in samples/<family>-candidates: num_samples over the smallest share of them."""
    classifier: ClassifierConfig = field(default_factory=lambda: ClassifierConfig(widths=(40, 80, 120), seed=1))
    """The classifier that picks them: of other widths and another seed than eval.classifier, so that no score is
    circular. Both learn from the same images, so they err alike; fd_random is the judge that depends on neither."""

    def __post_init__(self) -> None:
        for acceptance in self.acceptances:
            check_acceptance("eval.rejection.acceptances", acceptance)
        if len(set(self.acceptances)) < len(self.acceptances):
            raise ValueError(f"eval.rejection.acceptances={list(self.acceptances)} names a share twice")


@dataclass(frozen=True, kw_only=True)
class OnlineProbeConfig:
    epochs: int = 90
    """Passes over the training images."""
    warmup_epochs: float = 10
    """Passes of linear warm-up; from there the learning rate falls to 0 as a cosine."""
    batch_size: int = 1024
    """Images per step, over all processes together."""
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Peak learning rates for a batch of 256, scaled with the batch: each tap has a head for every one."""
    optimizer: Literal["sgd", "lars"] = "sgd"
    """SGD with momentum 0.9, or LARS over it; neither decays weights."""
    min_scale: float = 0.08
    """Training images are random rectangles of at least so much of the image's area, resized; 1 takes it whole."""
    flip: bool = True
    """Mirror half of the training images."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"eval.probe.online: epochs={self.epochs} and batch_size={self.batch_size} must be at least 1, and"
                f" warmup_epochs={self.warmup_epochs} must be below epochs, and not negative"
            )
        rates = self.learning_rates
        if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
            raise ValueError(f"eval.probe.online.learning_rates={list(rates)} must be above 0, differ, and be some")
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"eval.probe.online.min_scale={self.min_scale} must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    taps: tuple[str, ...] = ("pixels", "tokenizer.*", "vim.*", "vim_random.*", "dit.*")
    """What is probed, as far as the run has it: <model>.<tap>, where * stands for anything, as tokenizer.patch,
    tokenizer.encoder.2, tokenizer.post_quant, vim.block12, dit.block6@logsnr=0; the baselines pixels and vim_random.*
    (untrained weights); or timm:<model>:<weights file>, as in eval.features."""
    protocol: Literal["lbfgs", "mae"] = "lbfgs"
    """lbfgs: logistic regression on features of the images as they are; mae: heads trained by SGD on features of
    augmented images, as published for ImageNet."""
    c_grid: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    """Inverse penalties to choose from (scikit-learn's C)."""
    held_out: float = 0.1
    """Share of the training images on which penalty or learning rate, and tap, are chosen."""
    num_train: int = 10_000
    """Training images at most; 0 takes all."""
    num_test: int = 0
    """Test images at most; 0 takes all."""
    knn_k: int = 20
    """Neighbours that vote in k-NN, which goes with lbfgs alone; 0 leaves it out."""
    knn_temperature: float | None = 0.07
    """Neighbours vote with exp(cosine similarity / temperature); null: alike."""
    online: OnlineProbeConfig = field(default_factory=OnlineProbeConfig)
    """How the heads of the protocol mae are trained."""

    def __post_init__(self) -> None:
        if not self.taps:
            raise ValueError(f"eval.probe.taps is empty; name any of {', '.join(REPRESENTATIONS)}")
        for tap in self.taps:
            _check_tap(tap)
        if not self.c_grid or min(self.c_grid) <= 0:
            raise ValueError(f"eval.probe.c_grid={list(self.c_grid)} must hold at least one number, all above 0")
        if not 0 < self.held_out < 1:
            raise ValueError(f"eval.probe.held_out={self.held_out} must lie between 0 and 1")
        for key in ("num_train", "num_test", "knn_k"):
            if getattr(self, key) < 0:
                raise ValueError(f"eval.probe.{key}={getattr(self, key)} must not be negative")
        if self.knn_temperature is not None and not self.knn_temperature > 0:
            raise ValueError(f"eval.probe.knn_temperature={self.knn_temperature} must be above 0, or null")


def _check_tap(tap: str) -> None:
    """Raise ValueError unless a tap, or a pattern of taps, belongs to a model that could be there."""
    if tap.startswith("timm:") and tap.count(":") > 1:
        return
    if tap.split(".")[0] not in REPRESENTATIONS:
        known = ", ".join(model if model == "pixels" else f"{model}.*" for model in REPRESENTATIONS)
        raise ValueError(f"eval.probe.taps has {tap!r}; it takes {known}, or timm:<model>:<weights file>")
    if "@" in tap and not re.fullmatch(r"dit\..*@logsnr=[+-]?\d+(\.\d*)?", tap):
        raise ValueError(f"eval.probe.taps has {tap!r}; only dit has noise levels, as dit.block6@logsnr=0")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    num_samples: int = 500
    """Images per generator, and as many real training images to hold them against."""
    features: tuple[str, ...] = ("classifier", "random")
    """Judges of images: classifier, inception[:<rule>], random, timm:<model>:<weights file>[:<input size>][:<rule>], or
    timm:<model>:pretrained, the one entry that may fetch weights. A rule, by which images are resized, is tf1
    (Inception's own), clean (bicubic, antialiased) or antialias (bilinear, antialiased; timm's)."""
    inception_weights: str | None = None
    """File of the FID Inception weights; absent: torch hub's checkpoint folder. Never downloaded."""
    reference: str = "equal"
    """Real images that samples are held against: equal, as many training images as samples; all, every training image
    (as published FIDs have it); or a file or folder of images or of statistics (.npz)."""
    convention: Literal["unbiased", "torch_fidelity"] = "unbiased"
    """How FID's matrix root and KID are taken: unbiased, by singular values and over all pairs of images; or
    torch_fidelity, as that package has them, by eigenvalues and over 100 random subsets of 1,000."""
    infinity: bool = False
    """Also extrapolate the Frechet distance to infinitely many samples (FID-infinity), from 15 sizes of the set."""
    neighbours: int = 0
    """Lines of a sheet of the samples nearest to training images, and the score `copies`; 0 leaves both out."""
    cache: str | None = None
    """Folder in which features are kept for this and other runs; absent: .features in run.root. It may be deleted
    at any time."""
    lpips: Literal["auto", "none", "alex", "vgg", "squeeze"] = "auto"
    """LPIPS network; auto measures with each one whose trunk weights lie in torch hub's checkpoint folder."""
    batch_size: int = 128
    """Images per forward pass."""
    num_reconstructions: int = 0
    """Test images to reconstruct at most; 0 takes all."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """The classifier behind the classifier features and class_accuracy."""
    rejection: RejectionConfig = field(default_factory=RejectionConfig)
    """Rejection sampling: the best of the samples are scored beside all of them, under names of their own."""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Other ways to sample that are scored too: names, each with dotted keys such as diffusion.sample.guidance and
    their values. What cfg2 is of diffusion has the scores and samples diffusion@cfg2."""
    snapshots: bool = False
    """Score the snapshots of the training too (diffusion.train.snapshot_every), as diffusion@step<k>."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """The linear probe."""

    def __post_init__(self) -> None:
        for name, values in self.variants.items():
            _check_variant(name, values)
        if not self.features:
            raise ValueError("eval.features is empty; name at least one, such as random")
        if len(set(self.features)) < len(self.features):
            raise ValueError(f"eval.features={list(self.features)} names a judge twice")
        if self.num_samples < 20:
            raise ValueError(f"eval.num_samples={self.num_samples} is too few for any interval; take at least 20")
        if self.batch_size < 1:
            raise ValueError(f"eval.batch_size={self.batch_size} must be at least 1")
        if self.neighbours < 0:
            raise ValueError(f"eval.neighbours={self.neighbours} must not be negative; 0 leaves the sheet out")
        if self.rejection.acceptances and "classifier" in self.features and self._picks_as_it_judges:
            raise ValueError(
                "eval.rejection.classifier is the very one that judges (eval.classifier), so its scores would be "
                f"circular: use another --eval.rejection.classifier.seed, now {self.rejection.classifier.seed}, or path"
            )

    @property
    def _picks_as_it_judges(self) -> bool:
        picks, judges = self.rejection.classifier, self.classifier
        return picks.path == judges.path if picks.path or judges.path else picks == judges

    @property
    def least_images(self) -> int:
        """Images that each side of a comparison takes: two for each group of an interval, or a subset of KID."""
        return 1000 if self.convention == "torch_fidelity" else 20

    @property
    def main_features(self) -> str:
        """The features under kid, precision, recall, density, coverage and the nearest neighbours: Inception where it
        is listed, else the first listed."""
        return next((spec for spec in self.features if spec.startswith("inception")), self.features[0])


def _check_variant(name: str, values: dict[str, Any]) -> None:
    """Raise ValueError unless a variant has a name of its own and sets keys of one family's sampling."""
    where = f"eval.variants.{name}"
    if not VARIANT_NAME.fullmatch(name):
        raise ValueError(
            f"{where}: {name!r} cannot name samples: use letters, digits, and any of . + - _, and let it begin neither"
            " with accept nor with step, as subjects of rejection sampling and of snapshots do"
        )
    families = {key.split(".")[0] for key in values}
    wrong = [key for key in values if not re.match(r"(autoregressive|diffusion)\.sample\..", key)]
    if wrong or len(families) != 1:
        told = f"{wrong[0]!r} is no such key" if wrong else f"it has keys of {len(families)} families"
        raise ValueError(f"{where} takes keys such as diffusion.sample.guidance, all of one family, but {told}")


def check_acceptance(key: str, acceptance: float) -> None:
    """Raise ValueError unless a share of candidates lies between 0 and 1."""
    if not 0 < acceptance < 1:
        raise ValueError(f"{key}={acceptance} must lie between 0 and 1, as 0.25 does")
