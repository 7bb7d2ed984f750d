"""SAM's mask decoder without its own output tokens: composed from its frozen parts, open for learned class tokens.

Letters: B batch, C = 256 embedding channels, h = w embedding grid, K classes.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from icmoe.errors import BackboneError


class FrozenDecoder(nn.Module):
    """Turn image embeddings and class tokens into logits, one map per class token, in one pass.

    The same path as ``MaskDecoder.predict_masks`` without a prompt, with two differences: the tokens come from outside,
    and every token uses the first hypernetwork, the one of SAM's single-mask output. ``predict_masks`` itself does not
    fit: it reads its tokens from its own weight (no per-sample gradient) and repeats the embeddings per prompt row.

    Nothing here trains; gradients flow through to ``image_embeddings`` and ``class_tokens``. ``train()`` has no effect.

    Args:
        prompt_encoder: SAM's prompt encoder, already set to the embedding's grid.
        mask_decoder: SAM's mask decoder. Both are frozen in place.
    """

    def __init__(self, prompt_encoder: nn.Module, mask_decoder: nn.Module) -> None:
        super().__init__()
        # Any: segment_anything carries no types, and nn.Module's attributes are not callable for a type checker.
        self.prompt_encoder: Any = prompt_encoder
        self.mask_decoder: Any = mask_decoder
        self.requires_grad_(False)
        super().train(False)

    @property
    def mask_tokens(self) -> Tensor:
        """SAM's own mask tokens (4, 256), to initialise class tokens; clone before changing them."""
        weight: Tensor = self.mask_decoder.mask_tokens.weight
        return weight.detach()

    @property
    def embedding_size(self) -> int:
        """Side h of the embedding grid."""
        return int(self.prompt_encoder.image_embedding_size[0])

    def forward(self, image_embeddings: Tensor, class_tokens: Tensor) -> Tensor:
        """Decode.

        Args:
            image_embeddings: (B, 256, h, w), of the backbone, possibly adapted.
            class_tokens: (B, K, 256); they stand in the place of SAM's mask tokens.

        Returns:
            Logits (B, K, 4h, 4w).

        Raises:
            BackboneError: if the grid is not the backbone's, or the batch sizes differ.
        """
        batch, channels, height, width = image_embeddings.shape
        if (height, width) != (self.embedding_size, self.embedding_size) or class_tokens.shape[0] != batch:
            raise BackboneError(
                f"the decoder takes embeddings (B, {channels}, {self.embedding_size}, {self.embedding_size}) and "
                f"tokens (B, K, {channels}), got {tuple(image_embeddings.shape)} and {tuple(class_tokens.shape)}. Take "
                "both from the same backbone at the same image size."
            )
        quality_token = self.mask_decoder.iou_token.weight.expand(batch, 1, -1)
        no_mask = self.prompt_encoder.no_mask_embed.weight.reshape(1, channels, 1, 1)
        tokens, image = self.mask_decoder.transformer(
            image_embeddings + no_mask,
            self._image_encoding(image_embeddings.device).expand(batch, -1, -1, -1),
            torch.cat([quality_token, class_tokens], dim=1),
        )
        pixels = self.mask_decoder.output_upscaling(image.transpose(1, 2).reshape(batch, channels, height, width))
        filters = self.mask_decoder.output_hypernetworks_mlps[0](tokens[:, 1:])
        logits: Tensor = filters @ pixels.flatten(2)
        return logits.reshape(batch, -1, 4 * height, 4 * width)

    def train(self, mode: bool = True) -> Self:
        """Do nothing: a frozen decoder stays in evaluation mode, whatever its parent does."""
        return self

    def _image_encoding(self, device: torch.device) -> Tensor:
        # Not a buffer: sine and cosine may differ in the last bit from one processor to the next, and the backbone's
        # digest must not. Without autocast: in bf16 the phases are so coarse that the encoding is off by up to 0.12.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            encoding: Tensor = self.prompt_encoder.get_dense_pe()
            return encoding
