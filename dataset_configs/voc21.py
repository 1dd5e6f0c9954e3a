"""PASCAL VOC 2012 segmentation, validation split: 20 object classes and background."""

benchmark = dict(
    title="PASCAL VOC 2012, 20 classes + background",
    version=1,
    order=1,
    group="eight",
    num_classes=21,
    has_background=True,
    expected_images=1449,
    homes=["", "VOC2012", "VOCdevkit/VOC2012"],
    labels_from="SegmentationClass comes with VOCtrainval_11-May-2012.tar: palette PNGs, 0 = background, "
    "1..20 = objects, 255 = object borders",
    zero_in_most=True,
    has_255=True,
    ignored_in_most=True,
)

dataset = dict(
    type="PascalVOCDataset",
    data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
    ann_file="ImageSets/Segmentation/val.txt",
    img_suffix=".jpg",
    seg_map_suffix=".png",
    reduce_zero_label=False,
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
)
