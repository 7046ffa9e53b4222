"""Segmentation by words: a planted answer, an independent reading, and what it refuses."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from tests.dual_encoders import (
    VOCABULARY,
    make_dual_encoder,
    make_processor,
    make_tokenizer,
    save_dual_encoder,
)
from tests.training.conftest import save_tiny_tower
from unirefiner_hf.cli import main
from unirefiner_hf.data.labelled import LAYOUTS, ClassLabels, LabelError, class_labels
from unirefiner_hf.evaluation.checkpoints import load_checkpoint
from unirefiner_hf.evaluation.evaluate import evaluate
from unirefiner_hf.evaluation.zero_shot import (
    ZeroShotSettings,
    class_probabilities,
    predicted,
    protocol_of,
    read_names,
    similarity_map,
    text_features,
    word_set,
)
from unirefiner_hf.evaluation.zero_shot_sets import SETS, TEMPLATES
from unirefiner_hf.modeling.dense_text import dense_text_features
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel
from unirefiner_hf.modeling.text_side import load_text_side

COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8)
CLASSES = ("background", "cat", "dog", "sky")


def planted_clip():
    """Patches and texts point where their colour and their class word say.

    Red, green and blue have a channel each; ``cat``, ``dog`` and ``sky`` the same. Values
    pass through attention as they are, queries and keys are zero: a text's end token reads
    the mean of its words.
    """
    dual = make_dual_encoder("clip")
    with torch.no_grad():
        for parameter in dual.parameters():
            parameter.zero_()
        for name, parameter in dual.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1)
            if "v_proj.weight" in name or "out_proj.weight" in name:
                parameter.copy_(torch.eye(len(parameter)))
        patch = dual.vision_model.embeddings.patch_embedding.weight
        words = dual.text_model.embeddings.token_embedding.weight
        words[:, 5] = 1
        for channel, word in enumerate(CLASSES[1:]):
            patch[channel, channel] = 1 / 16
            words[VOCABULARY[word]] = torch.eye(words.shape[1])[channel]
            dual.visual_projection.weight[channel, channel] = 1
            dual.text_projection.weight[channel, channel] = 1
    return dual


def save_scenes(folder, labels, void=False):
    """Cells of 16 pixels; with `void` the two pixels at an edge do not count."""
    for kind in ("images", "labels"):
        (folder / "val" / kind).mkdir(parents=True)
    for number, label in enumerate(labels):
        label = np.asarray(label, dtype=np.uint8)
        label = label.repeat(16, axis=0).repeat(16, axis=1)
        image = Image.fromarray(COLOURS[label])
        if void:
            inner = np.roll(label, 1, axis=1) == np.roll(label, -1, axis=1)
            inner &= np.roll(label, 1, axis=0) == np.roll(label, -1, axis=0)
            label = np.where(inner, label, 255).astype(np.uint8)
        image.save(folder / "val" / "images" / f"{number}.png")
        Image.fromarray(label).save(folder / "val" / "labels" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    planted_clip().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    make_processor("siglip").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """Stripes as wide as a patch of the resized image, and one scene of nothing."""
    root = tmp_path_factory.mktemp("stripes")
    return save_scenes(
        root,
        [
            [[1, 1, 2, 2, 3, 3, 1, 1]] * 4,
            [[3] * 4, [3] * 4, [2] * 4, [2] * 4, [1] * 4, [1] * 4],
            [[0, 0]] * 2,
        ],
        void=True,
    )


@pytest.fixture(scope="module")
def classes_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("words") / "classes.txt"
    file.write_text("background\ncat\nthing, dog\nsky\n")
    return file


@pytest.mark.parametrize("variant", ["maskclip", "naclip", "clearclip"])
def test_planted_colours_are_found_whole(variant, planted, stripes, classes_file):
    """mIoU is 1 where values tell the class, and 0 where their words are swapped."""
    # Queries and keys are zero: only maskclip does not mix the whole window.
    options = {"window": 16, "window_stride": 8, "short_side": 16, "text_scale": 10.0}
    settings = ZeroShotSettings(
        variant=variant,
        classes_file=str(classes_file),
        background_threshold=0.4,
        sigma=0.1,
        **options,
    )
    found = evaluate(planted, stripes, protocol=settings)
    measured = found.rows[0].measured
    if variant == "maskclip":
        assert measured["mean_iou"].values == [1.0]
        assert measured["mean_accuracy"].values == [1.0]
    else:
        assert measured["mean_iou"].values[0] < 1
    swapped = classes_file.parent / "swapped.txt"
    swapped.write_text("background\ndog\nsky\ncat\n")
    settings = ZeroShotSettings(
        variant="maskclip",
        classes_file=str(swapped),
        background_threshold=0.4,
        **options,
    )
    measured = evaluate(planted, stripes, protocol=settings).rows[0].measured
    # Only the scene without a class is right.
    assert measured["mean_iou"].values == [0.25]


@pytest.mark.parametrize("kind", ["clip", "metaclip_2", "siglip", "siglip2 NaFlex"])
@torch.no_grad()
def test_equals_an_independent_reading(kind, tmp_path):
    """One window, words in one template: cosines of transformers' own model."""
    dual = save_dual_encoder(tmp_path / "base", kind)
    random = np.random.default_rng(0)
    root = save_scenes(tmp_path / "data", random.integers(1, 4, (3, 2, 2)))
    (root / "dataset.json").write_text(json.dumps({"classes": CLASSES}))
    plain = "value" if kind.startswith("siglip") else "plain"
    settings = ZeroShotSettings(variant=plain, templates="photo", short_side=16)
    found = evaluate(tmp_path / "base", root, protocol=settings).rows[0].measured

    side = load_text_side(tmp_path / "base")
    texts = [f"a photo of a {word}." for word in CLASSES]
    words = dual.get_text_features(**side.tokens(texts)).pooler_output
    tower = dual.vision_model
    bare = UniRefinerModel.from_tower(tower, register_width=0)
    hits, unions = np.zeros(4), np.zeros(4)
    for number in range(3):
        image = Image.open(root / "val" / "images" / f"{number}.png").resize(
            (16, 16), 3
        )
        label = np.asarray(Image.open(root / "val" / "labels" / f"{number}.png"))
        processor = make_processor(kind)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        mean, std = (
            torch.tensor(x)[:, None, None]
            for x in (processor.image_mean, processor.image_std)
        )
        tokens = bare((pixels - mean) / std).last_hidden_state
        if plain == "value":
            patches = [tower.head(token[None, None])[0] for token in tokens[0]]
            patches = torch.stack(patches)[None]
        else:
            patches = dual.visual_projection(tower.post_layernorm(tokens))
        cosines = torch.cosine_similarity(patches[0][:, None], words[None], dim=-1)
        cosines = cosines.T.unflatten(1, (4, 4))[None]
        large = functional.interpolate(cosines, (32, 32), mode="bilinear")
        guess = large[0].argmax(0).numpy()
        for name in range(4):
            hits[name] += ((guess == name) & (label == name)).sum()
            unions[name] += ((guess == name) | (label == name)).sum()
    expected = (hits[unions > 0] / unions[unions > 0]).mean()
    assert found["mean_iou"].values == [pytest.approx(expected, abs=1e-4)]


def test_one_command_compares_checkpoints(
    planted, stripes, classes_file, tmp_path, capsys
):
    """The refined checkpoint keeps its text: it is measured without its base, too."""
    merged = tmp_path / "merged"
    model = UniRefinerModel.from_tower(str(planted), register_width=1, final_norm=True)
    model.save_pretrained(merged)
    make_processor("clip").save_pretrained(merged)
    words = ["--task", "zero_shot", "--data", str(stripes)]
    words += ["--classes_file", str(classes_file), "--variant", "maskclip"]
    words += ["--window", "16", "--window_stride", "16", "--short_side", "16"]
    words += ["--background_threshold", "0.4", "--text_scale", "10"]
    words += ["--evaluation_output", str(tmp_path / "out"), "--dataset_name", "Stripes"]
    assert main(["evaluate", str(planted), str(merged), *words]) == 0
    table = capsys.readouterr().out
    assert "Stripes, val, 3 images: zero-shot, maskclip, window 16/16" in table
    assert "80 templates" in table and "probe" not in table
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 4 and all(row.count("| 100.0 ") == 2 for row in rows[1:])
    assert "border of 1" in rows[2] and "Missing control: self-dist" in table
    (first, _) = json.loads((merged / "evaluation.json").read_text())["entries"]
    assert first["metric"] == "mean_iou" and first["seeds"] == 0 and first["n"] == 3
    assert first["settings"]["classes"][2] == "thing, dog"
    assert (
        first["settings"]["scale"] == 10 and first["settings"]["variant"] == "maskclip"
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "probe" not in page and "IoU of each class" in page
    assert (tmp_path / "out" / "table.md").read_text().strip() == table.strip()

    assert main(["evaluate", str(merged), *words]) == 2
    said = capsys.readouterr().err
    assert "no checkpoint brings one" in said and "text/config.json" in said
    load_text_side(planted).save(merged)
    assert main(["evaluate", str(merged), *words]) == 0
    assert re.search(r"\| merged +\| 100.0 ", capsys.readouterr().out)


@torch.no_grad()
def test_the_frame_and_the_settings_reach_the_tower(tmp_path):
    dual = save_dual_encoder(tmp_path, "clip")
    base = load_checkpoint(str(tmp_path))
    words = functional.normalize(torch.randn(3, 20), dim=-1)
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    )
    pixels = base.reading(image, (16, 16))[None]
    maps = []
    for width, sigma in ((0, 5.0), (1, 5.0), (1, 0.5)):
        settings = ZeroShotSettings(short_side=16, sigma=sigma)
        protocol = protocol_of(base, SETS["voc"], settings)
        found = similarity_map(
            base.framed(width), image, words, dual.visual_projection, protocol
        )
        patches = dense_text_features(
            base.model,
            pixels,
            variant="naclip",
            projection=dual.visual_projection,
            register_width=width,
            sigma=sigma,
        )
        cosines = torch.cosine_similarity(patches[0][:, None], words[None], dim=-1)
        cosines = cosines.T.unflatten(1, (4, 4))[None]
        large = functional.interpolate(cosines, (16, 16), mode="bilinear")
        assert torch.allclose(found, large, atol=1e-4)
        maps.append(found)
    assert not torch.allclose(maps[0], maps[1], atol=1e-3)
    assert not torch.allclose(maps[1], maps[2], atol=1e-3)


def test_synonyms_and_background():
    names = (("a",), ("b", "c"), ("d",))
    cosines = torch.tensor([0.1, 0.0, 0.3, 0.2]).view(1, 4, 1, 1)
    probability = class_probabilities(cosines, names, 10.0)
    words = (10 * cosines.flatten()).softmax(0)
    assert torch.allclose(probability.flatten(), words[[0, 2, 3]])
    assert predicted(probability, 0.0, None).item() == 1
    assert predicted(probability, 0.6, 0).item() == 1
    assert predicted(probability, 0.7, 0).item() == 0
    assert predicted(probability, 0.7, None).item() == 1


@torch.no_grad()
def test_words_are_means_over_templates(tmp_path):
    dual = save_dual_encoder(tmp_path, "clip")
    side = load_text_side(tmp_path)
    found = text_features(side, (("cat",), ("dog", "sky")), "imagenet")
    assert found.shape == (3, 20)
    given = side.tokens([s.format("sky") for s in TEMPLATES["imagenet"]])
    each = dual.get_text_features(**given).pooler_output
    mean = (each / each.norm(dim=1, keepdim=True)).mean(0)
    assert torch.allclose(found[2], mean / mean.norm(), atol=1e-4)


def test_the_eight_sets_fit_their_labels():
    assert len(TEMPLATES["imagenet"]) == len(set(TEMPLATES["imagenet"])) == 80
    assert all(sentence.count("{}") == 1 for sentence in TEMPLATES["imagenet"])
    assert len(SETS) == 8 and SETS.keys() == LAYOUTS.keys()
    for layout, words in SETS.items():
        assert len(words.names) == LAYOUTS[layout].classes
        firsts = [group[0] for group in words.names]
        assert len(set(firsts)) == len(firsts) and all(firsts)
        assert (words.background == 0) == (words.threshold > 0)
    assert SETS["voc20"].names == SETS["voc"].names[1:]
    assert SETS["context59"].names == SETS["context60"].names[1:]
    things = [group[0] for group in SETS["coco_object"].names[1:]]
    assert [group[0] for group in SETS["coco_stuff"].names[:80]] == things


def test_coco_labels():
    """Values are COCO's ids less one; 11 is an id nobody uses, 255 unlabelled."""
    values = np.array([[0, 11, 12, 89, 91, 181, 255]], dtype=np.uint8)
    objects, stuff = (class_labels("x", name) for name in ("coco_object", "coco_stuff"))
    assert objects.read(values, "x").tolist() == [[1, 255, 12, 80, 0, 0, 0]]
    assert stuff.read(values, "x").tolist() == [[0, 255, 11, 79, 80, 170, 255]]
    assert SETS["coco_object"].names[12] == ("stop sign",)
    assert SETS["coco_stuff"].names[79] == ("toothbrush",)
    values = np.array([[0, 1, 20, 255]], dtype=np.uint8)
    assert class_labels("x", "voc20").read(values, "x").tolist() == [[255, 0, 19, 255]]


def test_sizes_follow_the_window(planted):
    checkpoint = load_checkpoint(str(planted))

    def sizes(layout, **options):
        protocol = protocol_of(checkpoint, SETS[layout], ZeroShotSettings(**options))
        return protocol.window, protocol.stride, protocol.side

    assert sizes("ade20k") == (16, 8, 24)
    assert sizes("cityscapes", window=223) == (224, 112, 560)
    assert sizes("coco_stuff", window=224, window_stride=50) == (224, 50, 448)
    protocol = protocol_of(checkpoint, SETS["voc"], ZeroShotSettings())
    assert (protocol.scale, protocol.threshold) == (65.0, 0.1)
    assert protocol.variant == "naclip"


def test_settings_that_do_not_fit(planted, tower_folder):
    checkpoint = load_checkpoint(str(planted))
    for options, message in (
        (
            {"variant": "value"},
            "variant is 'value'; a clip_vision_model tower has plain",
        ),
        ({"short_side": 12}, "short_side is 12 and the window 16"),
        ({"background_threshold": 0.2}, "no class of ADE20K is background"),
    ):
        with pytest.raises(ValueError, match=message):
            protocol_of(checkpoint, SETS["ade20k"], ZeroShotSettings(**options))
    dino = load_checkpoint(str(tower_folder))
    with pytest.raises(ValueError, match="dinov2 tower has no text side"):
        protocol_of(dino, SETS["ade20k"], ZeroShotSettings())
    for name, value in (("templates", "best"), ("sigma", 0), ("window", 0)):
        with pytest.raises(ValueError, match=f"{name} is {value!r}"):
            ZeroShotSettings(**{name: value})


def test_class_files_that_do_not_fit(tmp_path):
    file = tmp_path / "classes.txt"
    for text, message in (
        ("cat\n\ndog\n", "line 2: a class without a word"),
        ("cat\ndog,\n", "line 2: a class without a word"),
        ("cat\ndog, cat\n", "'cat' stands in lines 1 and 2"),
        ("\n", "classes.txt is empty"),
    ):
        file.write_text(text)
        with pytest.raises(LabelError, match=message):
            read_names(file)
    file.write_bytes(b"\xff\xfe\x00")
    for path in (file, tmp_path / "none.txt"):
        with pytest.raises(LabelError, match="cannot be read as text"):
            read_names(path)
    file.write_text("cat\ndog\n")
    three = ClassLabels(("a", "b", "c"))
    with pytest.raises(LabelError, match="has 2 lines, scenes has 3 classes"):
        word_set(three, "folder", "scenes", str(file))
    with pytest.raises(LabelError, match="has 2 lines, VOC21 has 21 classes"):
        word_set(class_labels("x", "voc"), "voc", "VOC21", str(file))
    with pytest.raises(LabelError, match="3 classes without names"):
        word_set(class_labels("x", num_classes=3), "folder", "scenes")


def test_refusals_of_the_command(planted, stripes, classes_file, tmp_path, capsys):
    def refused(*words):
        given = ["--task", "zero_shot", "--data", str(stripes), *words]
        assert main(["evaluate", *given]) == 2
        return capsys.readouterr().err

    base = str(planted)
    assert "dataset is 'voc12'" in refused(base, "--dataset", "voc12")
    assert "variant is 'best'" in refused(
        base, "--variant", "best", "--classes_file", str(classes_file)
    )
    assert "set num_classes" in refused(base)
    short = tmp_path / "short.txt"
    short.write_text("background\ncat\n")
    said = refused(base, "--classes_file", str(short), "--short_side", "16")
    assert "0.png: a label is 2; there are 2 classes" in said and "classes_file" in said
    vision = tmp_path / "vision"
    save_tiny_tower(vision, "clip_vision_model")
    said = refused(str(vision), "--classes_file", str(classes_file))
    assert "no checkpoint brings one" in said and "it is a clip_vision_model" in said
    bare = tmp_path / "bare"
    make_dual_encoder("clip").save_pretrained(bare)
    make_processor("clip").save_pretrained(bare)
    said = refused(str(bare), "--classes_file", str(classes_file))
    assert "has no tokenizer" in said
