"""What `tools/ablate.py` can train: shipped configs made small enough, and what is switched in them."""

from __future__ import annotations

# what makes the shipped configs small enough for a study; `--set` has the last word
SMALL = (
    "data.num_workers=0",
    "data.crop_scale=[0.4, 1.0]",
    "train.epochs=null",
    "train.global_batch_size=32",
    "train.micro_batch_size=16",
    "train.base_learning_rate=4e-3",
    "train.warmup_fraction=0.1",
    "train.gradient_clipping=1.0",
    "train.precision=fp32",
    "train.checkpoint_every=1000000",
    "train.keep_checkpoints=1",
)
UNTRAINED = ("train.steps=1", "train.base_learning_rate=1e-12")  # of the variants named random
TINY, TINY_VIT = ("method.model.backbone=vit_tiny",), ("method.model.size=tiny",)
# of 512 pixels tiles of 32 and cells of 16 are small; of 96 to 224 they are not
CORRUPTED = (*TINY, "method.corruption.tile=16", "method.corruption.cell=8")
FREPA_BASE = (*CORRUPTED, "method.hfl=null", "method.consistency=null")
ALL_TERMS = (
    "method.hfl={}",
    "method.consistency={}",
    "method.adversarial_image={}",
    "method.adversarial_embedding={}",
)
FREPA_CONFIG, MAE = "frepa/vit_b_17m", "frepa/mae_vit_b_17m"

# name: config, settings
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "base": (FREPA_CONFIG, FREPA_BASE),  # root mean squared error and gradient
    "hfl": (FREPA_CONFIG, (*FREPA_BASE, ALL_TERMS[0])),
    "consistency": (FREPA_CONFIG, (*FREPA_BASE, ALL_TERMS[1])),
    "adversarial_image": (FREPA_CONFIG, (*FREPA_BASE, ALL_TERMS[2])),
    "adversarial_embedding": (FREPA_CONFIG, (*FREPA_BASE, ALL_TERMS[3])),
    "all": (FREPA_CONFIG, (*FREPA_BASE, *ALL_TERMS)),
    "random": (FREPA_CONFIG, FREPA_BASE),
    "zero_masking": (FREPA_CONFIG, (*FREPA_BASE, "method.corruption.kinds={zero: 0.5, frequency: 0.5}")),
    "focal": (FREPA_CONFIG, (*FREPA_BASE, "method.focal={}")),
    "frepa": (FREPA_CONFIG, CORRUPTED),
    "frepa_histogram": ("frepa/histogram_only", CORRUPTED),
    "frepa_frequency": ("frepa/frequency_only", CORRUPTED),
    "mfm": ("frepa/mfm_vit_b_17m", TINY),
    "mae": (MAE, TINY_VIT),
    "mae_pixels": (MAE, (*TINY_VIT, "method.norm_pix_loss=false")),
    "hf_masking": ("retmae/hf_masking_vit_b", TINY_VIT),
    "pixmim": ("retmae/pixmim_vit_b", TINY_VIT),
    "retmae": ("retmae/vit_b", TINY_VIT),
    "retmae_random": ("retmae/teacher_random_vit_b", TINY_VIT),
    "random_mae": (MAE, TINY_VIT),
}
