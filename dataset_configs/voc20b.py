"""PASCAL VOC 2012, validation split: 20 object classes, and the background as what PASCAL Context's other names say.

Known as PAS-20b: 59 names are predicted, the 20 of VOC and the 39 others of PASCAL Context, and the 39 all count as one
background class. Here they are the words of class 20. The files of voc21: mmseg's class reads them, told the other order
of the classes.
"""

benchmark = dict(
    title="PASCAL VOC 2012, 20 classes + background of 39 names",
    version=1,
    order=12,
    group="large-vocabulary",
    num_classes=21,
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
    type="PascalVOCDataset",
    data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
    ann_file="ImageSets/Segmentation/val.txt",
    img_suffix=".jpg",
    seg_map_suffix=".png",
    reduce_zero_label=False,
    ignore_index=255,
    # Objects first, the background last.
    raw_ids=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 0],
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
