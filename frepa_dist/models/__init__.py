"""Networks.

timm is imported where a network is built, not above: with torchvision and what of torch this loads it takes
as long as torch itself, and whoever reads a config (`frepa pretrain`, `frepa plan`) needs none of it.
"""
