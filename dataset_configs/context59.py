"""PASCAL Context (VOC 2010 images), validation split, background ignored: 59 classes (files of context60)."""

benchmark = dict(
    title="PASCAL Context, 59 classes",
    version=1,
    order=5,
    group="eight",
    num_classes=59,
    has_background=False,
    expected_images=5104,
    homes=["", "VOC2010", "VOCdevkit/VOC2010"],
    labels_from="SegmentationClassContext and ImageSets/SegmentationContext are not part of VOC 2010: make them from "
    "trainval_merged.json and the 'detail' API with mmsegmentation's tools/dataset_converters/pascal_context.py "
    "(0 = background, 1..59 = classes)",
    zero_in_most=True,
    has_255=False,
)

dataset = dict(
    type="PascalContextDataset59",
    data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClassContext"),
    ann_file="ImageSets/SegmentationContext/val.txt",
    img_suffix=".jpg",
    seg_map_suffix=".png",
    reduce_zero_label=True,
    ignore_index=255,
)

train = dict(
    data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClassContext"),
    ann_file="ImageSets/SegmentationContext/train.txt",
    expected_images=4998,
    stems=["2010_{i:06d}"],
)

downloads = dict(
    val=["VOCtrainval_03-May-2010.tar", "trainval_merged.json"],
    train=["VOCtrainval_03-May-2010.tar", "trainval_merged.json"],
)

synth = dict(
    home="VOCdevkit/VOC2010",
    stems=["2008_{i:06d}", "2009_{i:06d}"],
    short=336,
    long=448,
    portraits=True,
    label_mode="L",
    void="none",
    things="any",
    always_zero=True,
    zero_words=["background"],
)
