"""Class names of the eight open-vocabulary sets, and how each is measured.

Names and synonyms are those of SCLIP (arXiv 2312.01597), later papers took them over;
joined words are written apart ("traffic light"). Classes stand in the order of the labels,
synonyms behind a comma. Where label 0 is background, its words are everyday surroundings
for the object sets, which the background of an object photograph shows.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGENET, PHOTO = "imagenet", "photo"

_VOC = """
aeroplane; bicycle; bird; ship; bottle; bus; car; cat; chair; cow; table; dog; horse;
motorbike; person, person in shirt, person in jeans, person in dress, person in
sweater, person in skirt, person in jacket; potted plant; sheep; sofa; train;
television monitor, tv monitor, monitor, television, screen
"""

_CONTEXT = """
aeroplane; bag; bed; bedclothes; bench; bicycle; bird; boat; book; bottle; building;
bus; cabinet; car; cat; ceiling; chair; cloth; computer; cow; cup; curtain; dog; door;
fence; floor; flower; food; grass; ground; horse; keyboard; light; motorbike;
mountain; mouse; person; plate; platform; potted plant; road; rock; sheep; shelves;
sidewalk; sign; sky; snow; sofa; table; track; train; tree; truck; tv monitor; wall;
water; window; wood
"""

_THINGS = """
person, person in shirt, person in jeans, person in dress, person in sweater, person
in skirt, person in jacket, body; bicycle; car; motorcycle; airplane; bus; train;
truck; boat; traffic light; fire hydrant; stop sign; parking meter; bench; bird; cat;
dog; horse; sheep; cow; elephant; bear; zebra; giraffe; backpack; umbrella; handbag;
tie; suitcase; frisbee; skis; snowboard; sports ball; kite; baseball bat; baseball
glove; skateboard; surfboard; tennis racket; bottle; wine glass; cup; fork; knife;
spoon; bowl; banana; apple; sandwich; orange; broccoli; carrot; hot dog; pizza; donut;
cake; chair; couch; potted plant; bed; dining table; toilet; tv; laptop; mouse;
remote; keyboard; cell phone; microwave; oven; toaster; sink; refrigerator; book;
clock; vase; scissors; teddy bear; hair drier; toothbrush
"""

_STUFF = """
banner; blanket; branch; bridge; building; bush; cabinet; cage; cardboard; carpet;
ceiling; tile ceiling; cloth; clothes; clouds; counter; cupboard; curtain; desk; dirt;
door; fence; marble floor; floor; stone floor; tile floor; wood floor; flower; fog;
food; fruit; furniture; grass; gravel; ground; hill; house; leaves; light; mat; metal;
mirror; moss; mountain; mud; napkin; net; paper; pavement; pillow; plant; plastic;
platform; playing field; railing; railroad; river; road; rock; roof; rug; salad; sand;
sea; shelf; sky; skyscraper; snow; solid; stairs; stone; straw; structural; table;
tent; textile; towel; tree; vegetable; brick wall; concrete wall; wall; panel wall;
stone wall; tile wall; wood wall; water; water drops; window blind; window; wood
"""

_CITYSCAPES = """
road; sidewalk; building; wall; fence; pole; traffic light; traffic sign; vegetation;
terrain; sky; person; rider; car; truck; bus; train; motorcycle; bicycle
"""

_ADE20K = """
wall; building; sky; floor; tree; ceiling; road; bed; windowpane; grass; cabinet;
sidewalk; person; earth; door; table; mountain; plant; curtain; chair; car; water;
painting; sofa; shelf; house; sea; mirror; rug; field; armchair; seat; fence; desk;
rock; wardrobe; lamp; bathtub; railing; cushion; base; box; column; signboard; chest
of drawers; counter; sand; sink; skyscraper; fireplace; refrigerator; grandstand;
path; stairs; runway; case; pool table; pillow; screen door; stairway; river; bridge;
bookcase; blind; coffee table; toilet; flower; book; hill; bench; countertop; stove;
palm; kitchen island; computer; swivel chair; boat; bar; arcade machine; hovel; bus;
towel; light; truck; tower; chandelier; awning; street light; booth; television
receiver; airplane; dirt track; apparel; pole; land; bannister; escalator; ottoman;
bottle; buffet; poster; stage; van; ship; fountain; conveyor belt; canopy; washer;
plaything; swimming pool; stool; barrel; basket; waterfall; tent; bag; minibike;
cradle; oven; ball; food; step; tank; trade name; microwave; pot; animal; bicycle;
lake; dishwasher; screen; blanket; sculpture; hood; sconce; vase; traffic light; tray;
ashcan; fan; pier; crt screen; plate; monitor; bulletin board; shower; radiator;
glass; clock; flag
"""

_SURROUNDINGS = """
sky, wall, tree, wood, grass, road, sea, river, mountain, sands, desk, bed, building,
cloud, lamp, door, window, wardrobe, ceiling, shelf, curtain, stair, floor, hill, rail,
fence
"""

Names = tuple[tuple[str, ...], ...]
"""The words of each class, the first is its name."""


@dataclass(frozen=True)
class WordSet:
    """A data set's words and the numbers it is published with.

    Attributes:
        title: in tables.
        names: of each class.
        background: class of pixels where no word is probable; None where every class has
            a word of its own.
        short_side: of the image, in pixels where the window is 224.
        scale: of the cosines, before the softmax.
        threshold: of the probability, below which a pixel is background.
    """

    title: str
    names: Names
    background: int | None = None
    short_side: int = 336
    scale: float = 40.0
    threshold: float = 0.0


def parse_names(text: str) -> Names:
    """``a, b; c`` to the words of two classes."""
    return tuple(
        tuple(" ".join(word.split()) for word in entry.split(","))
        for entry in text.split(";")
    )


# COCO-Stuff has no synonyms: of each thing the first word.
_COCO_THINGS = "; ".join(entry.split(",")[0] for entry in _THINGS.split(";"))

SETS = {
    "voc": WordSet(
        "VOC21", parse_names(f"{_SURROUNDINGS}; {_VOC}"), 0, scale=65.0, threshold=0.1
    ),
    "voc20": WordSet("VOC20", parse_names(_VOC)),
    "context60": WordSet(
        "PASCAL Context 60",
        parse_names(f"background; {_CONTEXT}"),
        0,
        scale=50.0,
        threshold=0.1,
    ),
    "context59": WordSet("PASCAL Context 59", parse_names(_CONTEXT)),
    "coco_object": WordSet(
        "COCO-Object",
        parse_names(f"{_SURROUNDINGS}; {_THINGS}"),
        0,
        scale=50.0,
        threshold=0.1,
    ),
    "coco_stuff": WordSet(
        "COCO-Stuff 171", parse_names(f"{_COCO_THINGS}; {_STUFF}"), short_side=448
    ),
    "cityscapes": WordSet("Cityscapes", parse_names(_CITYSCAPES), short_side=560),
    "ade20k": WordSet("ADE20K", parse_names(_ADE20K)),
}
"""By layout, see `labelled_images.LAYOUTS`; sides, scales and thresholds are SCLIP's."""

TEMPLATES = {
    PHOTO: ("a photo of a {}.",),
    IMAGENET: (
        "a bad photo of a {}.",
        "a photo of many {}.",
        "a sculpture of a {}.",
        "a photo of the hard to see {}.",
        "a low resolution photo of the {}.",
        "a rendering of a {}.",
        "graffiti of a {}.",
        "a bad photo of the {}.",
        "a cropped photo of the {}.",
        "a tattoo of a {}.",
        "the embroidered {}.",
        "a photo of a hard to see {}.",
        "a bright photo of a {}.",
        "a photo of a clean {}.",
        "a photo of a dirty {}.",
        "a dark photo of the {}.",
        "a drawing of a {}.",
        "a photo of my {}.",
        "the plastic {}.",
        "a photo of the cool {}.",
        "a close-up photo of a {}.",
        "a black and white photo of the {}.",
        "a painting of the {}.",
        "a painting of a {}.",
        "a pixelated photo of the {}.",
        "a sculpture of the {}.",
        "a bright photo of the {}.",
        "a cropped photo of a {}.",
        "a plastic {}.",
        "a photo of the dirty {}.",
        "a jpeg corrupted photo of a {}.",
        "a blurry photo of the {}.",
        "a photo of the {}.",
        "a good photo of the {}.",
        "a rendering of the {}.",
        "a {} in a video game.",
        "a photo of one {}.",
        "a doodle of a {}.",
        "a close-up photo of the {}.",
        "a photo of a {}.",
        "the origami {}.",
        "the {} in a video game.",
        "a sketch of a {}.",
        "a doodle of the {}.",
        "a origami {}.",
        "a low resolution photo of a {}.",
        "the toy {}.",
        "a rendition of the {}.",
        "a photo of the clean {}.",
        "a photo of a large {}.",
        "a rendition of a {}.",
        "a photo of a nice {}.",
        "a photo of a weird {}.",
        "a blurry photo of a {}.",
        "a cartoon {}.",
        "art of a {}.",
        "a sketch of the {}.",
        "a embroidered {}.",
        "a pixelated photo of a {}.",
        "itap of the {}.",
        "a jpeg corrupted photo of the {}.",
        "a good photo of a {}.",
        "a plushie {}.",
        "a photo of the nice {}.",
        "a photo of the small {}.",
        "a photo of the weird {}.",
        "the cartoon {}.",
        "art of the {}.",
        "a drawing of the {}.",
        "a photo of the large {}.",
        "a black and white photo of a {}.",
        "the plushie {}.",
        "a dark photo of a {}.",
        "itap of a {}.",
        "graffiti of the {}.",
        "a toy {}.",
        "itap of my {}.",
        "a photo of a cool {}.",
        "a photo of a small {}.",
        "a tattoo of the {}.",
    ),
}
"""Those of CLIP for ImageNet, 80 (arXiv 2103.00020), and one alone."""
