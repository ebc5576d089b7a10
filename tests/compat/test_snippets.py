"""Do examples written for OpenCLIP and OpenAI's package run when only their import is changed?

The calls are those of widely read introductions to both: an API reference, a practical guide, OpenCLIP's README and a
walk-through of OpenAI's package. docs/compat.md names the examples that cannot run, and why."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import miniclip.compat.clip as clip
import miniclip.compat.open_clip as open_clip
from miniclip.utils.errors import InputError
from miniclip.weights.convert import convert

device = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("names")


@pytest.fixture(autouse=True)
def half_under_autocast():
    """Autocast gives float16 on a GPU. On a CPU it would be bfloat16, which numpy does not know: see docs/compat.md."""
    torch.set_autocast_dtype("cpu", torch.float16)
    yield
    torch.set_autocast_dtype("cpu", torch.bfloat16)


@pytest.fixture
def loaded(names):
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained="laion2b_s34b_b79k")
    return model.eval().to(device), preprocess, open_clip.get_tokenizer("ViT-B-32")


class TestReference:
    """The API reference."""

    def test_create_model(self):
        model = open_clip.create_model(
            model_name="ViT-B-32", pretrained="laion2b_s34b_b79k", precision="fp16", device=device
        )
        assert model.encode_image(torch.zeros(1, 3, 224, 224, device=device)).dtype == torch.float16

    def test_create_model_from_a_folder(self, names, small):
        small["ViT-B-32"].save_pretrained(names / "saved")
        convert(names / "saved", names / "folder", "openclip")
        model = open_clip.create_model(model_name=f"local-dir:{names / 'folder'}", force_image_size=256)
        assert model.encode_image(torch.zeros(1, 3, 256, 256)).shape == (1, 512)

    def test_preprocessing(self):
        preprocess = open_clip.image_transform_v2(
            cfg=open_clip.PreprocessCfg(size=224, resize_mode="squash"), is_train=False
        )
        assert preprocess(Image.open("test_image.jpg")).unsqueeze(0).to(device).shape == (1, 3, 224, 224)

    def test_tokenizer(self):
        tokenizer = open_clip.SimpleTokenizer()
        assert tokenizer(["a photo of a cat", "a picture of a dog"], context_length=77).shape == (2, 77)

    def test_tags(self):
        tags = open_clip.list_pretrained_tags_by_model("ViT-L-14")
        assert {"openai", "laion400m_e31", "laion2b_s32b_b82k"} <= set(tags)

    def test_download(self, names):
        cfg = open_clip.get_pretrained_cfg("ViT-B-32", "laion2b_s34b_b79k")
        assert open_clip.download_pretrained(cfg, cache_dir=str(names.parent / "cache")).is_file()

    def test_zero_shot(self, loaded):
        model, preprocess, tokenizer = loaded
        image = preprocess(Image.open("test_image.jpg")).unsqueeze(0).to(device)
        classnames, templates = ["cat", "dog", "bird"], ["a photo of a {}", "an image of a {}"]
        zeroshot_weights = open_clip.build_zero_shot_classifier(model, tokenizer, classnames, templates, device=device)
        image_features = model.encode_image(image, normalize=True)
        logits = image_features @ zeroshot_weights
        assert logits.argmax(dim=1).shape == (1,) and zeroshot_weights.shape == (512, 3)

    def test_losses(self, loaded):
        model, _, tokenizer = loaded
        image, text, scale = model(torch.rand(2, 3, 224, 224, device=device), tokenizer(["a", "b"]).to(device))
        loss = open_clip.ClipLoss(local_loss=False, gather_with_grad=False, cache_labels=True)
        assert loss(image, text, scale) > 0
        assert open_clip.SigLipLoss(dist_impl="bidir")(image, text, scale, torch.tensor(-10.0, device=device)) > 0

    def test_config_of_ones_own(self, names):
        custom = {"embed_dim": 16, "vision_cfg": {"width": 64, "layers": 1}, "text_cfg": {"width": 64, "layers": 1}}
        (names / "custom_config.json").write_text(json.dumps(custom))
        model_cfg = json.load(open("custom_config.json"))
        with pytest.warns(UserWarning, match="random weights"):
            model = open_clip.create_model(model_name="custom", pretrained=None, model_kwargs=model_cfg)
        assert model.encode_image(torch.zeros(1, 3, 224, 224)).shape == (1, 16)

    def test_low_precision_and_grad_checkpointing(self, loaded):
        model, _, _ = loaded
        model.set_grad_checkpointing(True)
        assert model.visual.checkpoint_every == model.text.checkpoint_every == 1
        model.encode_image(torch.rand(1, 3, 224, 224, device=device)).sum().backward()
        model.set_grad_checkpointing(False)
        open_clip.convert_weights_to_lp(model, dtype=torch.float16)
        assert model.dtype == torch.float16

    def test_what_cannot_run(self):
        with pytest.raises(AttributeError, match="push_to_hub"):
            open_clip.push_to_hf_hub  # noqa: B018


def build_zero_shot_classifier(model, tokenizer, class_names, templates, device):
    with torch.no_grad(), torch.autocast(device):
        prompts = [template.format(name) for name in class_names for template in templates]
        text = tokenizer(prompts).to(device)
        text_features = model.encode_text(text)
        text_features = text_features / text_features.norm(dim=-1, keepdim=True)
        class_features = text_features.reshape(len(class_names), len(templates), -1).mean(dim=1)
        return class_features / class_features.norm(dim=-1, keepdim=True)


def zero_shot_classify(model, preprocess, classifier, image_path, class_names, device):
    image = preprocess(Image.open(image_path)).unsqueeze(0).to(device)
    with torch.no_grad(), torch.autocast(device):
        image_features = model.encode_image(image)
        image_features = image_features / image_features.norm(dim=-1, keepdim=True)
        logits = (100.0 * image_features @ classifier.T).softmax(dim=-1)
    return {"scores": logits.cpu().numpy()[0], "top_class": class_names[logits.argmax().item()]}


class TestGuide:
    """The practical guide."""

    @pytest.fixture
    def guide(self, names):
        model, preprocess, _ = open_clip.create_model_and_transforms(
            "ViT-B-32", pretrained="laion2b_s34b_b79k", device=device, jit=False
        )
        model.eval()
        return model, preprocess, open_clip.get_tokenizer("ViT-B-32")

    def test_features(self, guide):
        model, preprocess, tokenizer = guide
        image = preprocess(Image.open("test_image.jpg")).unsqueeze(0).to(device)
        texts = tokenizer(["a photo of a dog", "a photo of a cat", "a photo of a bird"]).to(device)
        with torch.no_grad(), torch.autocast(device):
            image_features, text_features = model.encode_image(image), model.encode_text(texts)
            image_features = image_features / image_features.norm(dim=-1, keepdim=True)
            text_features = text_features / text_features.norm(dim=-1, keepdim=True)
            similarity = (image_features @ text_features.T).cpu().numpy()
        assert similarity.shape == (1, 3) and np.abs(similarity).max() <= 1.001

    @pytest.mark.parametrize("class_names", [["cat", "dog", "bird", "car", "tree"], ["violence", "weapon", "alcohol"]])
    def test_zero_shot_and_moderation(self, guide, class_names):
        model, preprocess, tokenizer = guide
        templates = ["a photo of a {}", "a picture of a {}", "an image of a {}"]
        classifier = build_zero_shot_classifier(model, tokenizer, class_names, templates, device)
        result = zero_shot_classify(model, preprocess, classifier, "test_image.jpg", class_names, device)
        assert result["top_class"] in class_names and result["scores"].sum() == pytest.approx(1, abs=0.01)

    def test_search_engine(self, guide, names):
        faiss = pytest.importorskip("faiss", reason="needs faiss: pip install faiss-cpu")
        model, preprocess, tokenizer = guide
        index, paths = faiss.IndexFlatIP(512), []
        for path in sorted(names.glob("*.jpg")):
            paths.append(str(path))
            image = preprocess(Image.open(path)).unsqueeze(0).to(device)
            with torch.no_grad(), torch.autocast(device):
                features = model.encode_image(image)
                features = features / features.norm(dim=-1, keepdim=True)
            index.add(features.cpu().numpy())
        text = tokenizer(["red dress with floral pattern"]).to(device)
        with torch.no_grad(), torch.autocast(device):
            text_features = model.encode_text(text)
            text_features = text_features / text_features.norm(dim=-1, keepdim=True)
        assert index.search(text_features.cpu().numpy(), 1)[1].tolist() == [[0]]

    def test_batches(self, guide):
        model, preprocess, _ = guide

        class ImageDataset(Dataset):
            def __init__(self, paths, transform):
                self.paths, self.transform = paths, transform

            def __len__(self):
                return len(self.paths)

            def __getitem__(self, idx):
                return self.transform(Image.open(self.paths[idx]))

        for param in model.parameters():
            param.requires_grad = False
        loader = DataLoader(ImageDataset(["CLIP.png", "test_image.jpg"], preprocess), batch_size=32, shuffle=False)
        features = []
        with torch.no_grad(), torch.autocast(device):
            for batch in loader:
                batch_features = model.encode_image(batch.to(device))
                batch_features = batch_features / batch_features.norm(dim=-1, keepdim=True)
                features.append(batch_features.cpu().numpy())
        assert np.vstack(features).shape == (2, 512)

    def test_saving(self, guide):
        model, _, tokenizer = guide
        torch.save({"model_state_dict": model.state_dict(), "config": model.config}, "openclip_model.pt")
        with pytest.warns(UserWarning, match="random weights"):
            again = open_clip.create_model("ViT-B-32")
        again.load_state_dict(torch.load("openclip_model.pt")["model_state_dict"])
        ids = tokenizer(["a dog"])
        assert torch.equal(again.encode_text(ids), model.cpu().encode_text(ids))

    @pytest.mark.filterwarnings("ignore")  # of the exporter, about its own code
    @pytest.mark.parametrize("axes", [{}, {"opset_version": 14}])
    def test_onnx(self, guide, axes):
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"needs {package}: pip install onnx onnxscript onnxruntime")
        import onnxruntime

        model, _, tokenizer = guide
        model.cpu()
        batch = {name: {0: "batch_size"} for name in ("image", "text", "image_features", "text_features")}
        torch.onnx.export(
            model, (torch.randn(1, 3, 224, 224), tokenizer(["test"])), "clip.onnx", input_names=["image", "text"],
            output_names=["image_features", "text_features"], **axes | ({"dynamic_axes": batch} if axes else {}),
        )  # fmt: skip
        n = 3 if axes else 1  # dynamic sizes are right though the example has a batch of one
        image, text = torch.randn(n, 3, 224, 224), tokenizer(["a cat", "a dog", "a bird"][:n])
        found = onnxruntime.InferenceSession("clip.onnx").run(
            ["image_features", "text_features"], {"image": image.numpy(), "text": text.numpy()}
        )
        for features, expected in zip(found, model(image, text)):
            torch.testing.assert_close(torch.from_numpy(features), expected.detach(), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("pretrained", ["laion2b_s34b_b79k", "a local path"])
def test_readme(pretrained, names):
    if pretrained == "a local path":
        pretrained = str(next((names.parent / "cache").glob("models--laion*/snapshots/*/open_clip_model.safetensors")))
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained=pretrained)
    model.eval()
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    image = preprocess(Image.open("CLIP.png")).unsqueeze(0)
    text = tokenizer(["a diagram", "a dog", "a cat"])
    with torch.no_grad(), torch.autocast("cuda"):
        image_features = model.encode_image(image)
        text_features = model.encode_text(text)
        image_features /= image_features.norm(dim=-1, keepdim=True)
        text_features /= text_features.norm(dim=-1, keepdim=True)
        text_probs = (100.0 * image_features @ text_features.T).softmax(dim=-1)
    assert text_probs.sum().item() == pytest.approx(1, abs=0.01)
    assert ("ViT-B-32", "laion2b_s34b_b79k") in open_clip.list_pretrained()


class TestOpenAI:
    """The walk-through of OpenAI's package."""

    def test_models(self):
        assert clip.available_models() == [
            "RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px",
        ]  # fmt: skip
        with pytest.raises(InputError, match="Model RN51 not found; available models = .'RN50'"):
            clip.load("RN51")

    def test_demo(self):
        model, preprocess = clip.load("ViT-B/32", device=device)
        assert "QuickGELU" in str(model) and not model.training
        image = preprocess(Image.open("CLIP.png")).unsqueeze(0).to(device)
        text = clip.tokenize(["a diagram", "a dog", "a cat"]).to(device)
        with torch.no_grad():
            assert model.encode_image(image).shape == (1, 512)
            assert model.encode_text(text).shape == (3, 512)
            logits_per_image, logits_per_text = model(image, text)
            probs = logits_per_image.softmax(dim=-1).cpu().numpy()
        assert probs.shape == (1, 3) and torch.equal(logits_per_text, logits_per_image.T)

    def test_tokenize(self):
        ids = clip.tokenize(["i am a handsome boy"]).to(device)
        assert ids.shape == (1, 77) and ids.dtype == torch.int32
        assert ids[0, :8].tolist() == [49406, 328, 687, 320, 7438, 1876, 49407, 0]

    def test_the_steps_of_encode_text(self):
        model, _ = clip.load("ViT-B/32", device=device)
        text = clip.tokenize(["a diagram", "a dog", "a cat"]).to(device)
        x = model.token_embedding(text).type(model.dtype)
        x = x + model.positional_embedding.type(model.dtype)
        x = x.permute(1, 0, 2)
        x = model.transformer(x)
        x = x.permute(1, 0, 2)
        x = model.ln_final(x).type(model.dtype)
        x = x[torch.arange(x.shape[0]), text.argmax(dim=-1)] @ model.text_projection
        torch.testing.assert_close(x, model.encode_text(text), atol=1e-3 if device == "cuda" else 1e-6, rtol=0)
