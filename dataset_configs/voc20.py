"""PASCAL VOC 2012 segmentation, validation split, background ignored: 20 object classes.

The files of voc21. mmseg's PascalVOCDataset knows 21 classes only, so the plain BaseSegDataset reads them; class names
and palette are filled in from the word list.
"""

benchmark = dict(
    title="PASCAL VOC 2012, 20 classes",
    version=1,
    order=4,
    group="eight",
    num_classes=20,
    has_background=False,
    expected_images=1449,
    homes=["", "VOC2012", "VOCdevkit/VOC2012"],
    labels_from="SegmentationClass comes with VOCtrainval_11-May-2012.tar: palette PNGs, 0 = background, "
    "1..20 = objects, 255 = object borders",
    zero_in_most=True,
    has_255=True,
    ignored_in_most=True,
)

dataset = dict(
    type="BaseSegDataset",
    data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
    ann_file="ImageSets/Segmentation/val.txt",
    img_suffix=".jpg",
    seg_map_suffix=".png",
    reduce_zero_label=True,
    ignore_index=255,
)

downloads = dict(
    val=["VOCtrainval_11-May-2012.tar"],
)

synth = dict(
    home="VOCdevkit/VOC2012",
    stems=["2007_{i:06d}", "2008_{i:06d}"],
    short=336,
    long=448,
    portraits=True,
    label_mode="P",
    void="border",
    things="foreground",
    # What label 0, ignored here, shows: the same surroundings as in voc21.
    zero_words=[
        "sky",
        "wall",
        "tree",
        "wood",
        "grass",
        "road",
        "sea",
        "river",
        "mountain",
        "sands",
        "desk",
        "bed",
        "building",
        "cloud",
        "lamp",
        "door",
        "window",
        "wardrobe",
        "ceiling",
        "shelf",
        "curtain",
        "stair",
        "floor",
        "hill",
        "rail",
        "fence",
    ],
)
