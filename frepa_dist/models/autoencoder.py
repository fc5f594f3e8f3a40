"""The network of methods that see the whole corrupted image: encoder, neck, decoder.

Shapes: B batch, S image side, s stride, h = w = S / s, D width of the encoder, E width of the neck.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from frepa_dist.models.backbones import Backbone, BackboneSettings, create_backbone, pool
from frepa_dist.models.decoder import Decoder, create_neck
from frepa_dist.models.initialize import initialize

__all__ = ["AutoencoderOutput", "BackboneAutoencoder", "create_autoencoder", "initialize"]


class AutoencoderOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        prediction: (num_decoded, 3, S, S) float32, the image in [0, 1], not clamped.
        embedding: (B, E, h, w), what the decoder works on.
        pooled: (B, D) float32, the mean over positions of the encoder's map.
    """

    prediction: Tensor
    embedding: Tensor
    pooled: Tensor


class BackboneAutoencoder(nn.Module):
    """A `methods.base.Student`; its parameters are named `encoder.*`, `neck.*` and `decoder.*`.

    Attributes:
        width: D.
        image_size: S.
        patch_size: s where the encoder can leave positions out, else None.
    """

    def __init__(
        self,
        encoder: Backbone,
        *,
        neck_width: int | None = 128,
        decoder_min_width: int = 16,
        decoder_groups: int = 8,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.neck = create_neck(encoder.width, neck_width)
        self.decoder = Decoder(
            neck_width or encoder.width,
            encoder.stride,
            min_width=decoder_min_width,
            groups=decoder_groups,
            activation_checkpointing=activation_checkpointing,
        )
        self.width, self.image_size = encoder.width, encoder.image_size
        self.patch_size = encoder.stride if encoder.can_drop_tokens else None

    def forward(self, images: Tensor, num_decoded: int | None = None) -> AutoencoderOutput:
        """Encode all images, decode the first ones.

        Args:
            images: (B, 3, S, S) normalized.
            num_decoded: how many of them are decoded; None decodes all.
        """
        features = self.encoder(images)
        embedding = self.neck(features)
        prediction = self.decoder(embedding[:num_decoded])
        return AutoencoderOutput(prediction, embedding, pool(features, is_map=True))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay although they have more than one dimension."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def map(self, images: Tensor) -> Tensor:
        """Give the encoder's map after the final norm: (B, 3, S, S) normalized -> (B, D, h, w)."""
        return self.encoder(images)  # type: ignore[no-any-return]

    def embed(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """See `methods.base.Student`: the mean over positions of the encoder's map, in float32."""
        return pool(self.encoder(images, ids_keep), is_map=ids_keep is None)


def create_autoencoder(settings: BackboneSettings) -> BackboneAutoencoder:
    """Create the network of settings, freshly initialized, whatever `init` says.

    Raises:
        ConfigError: the image size does not fit the backbone.
    """
    return BackboneAutoencoder(
        create_backbone(settings),
        neck_width=settings.neck_width,
        decoder_min_width=settings.decoder_min_width,
        decoder_groups=settings.decoder_groups,
        activation_checkpointing=settings.activation_checkpointing,
    )
