"""Cityscapes fine annotations, validation split: 19 classes."""

benchmark = dict(
    title="Cityscapes, 19 classes",
    version=1,
    order=7,
    group="eight",
    num_classes=19,
    has_background=False,
    expected_images=500,
    homes=["", "cityscapes", "Cityscapes"],
    labels_from="*_gtFine_labelTrainIds.png are made from gtFine_trainvaltest.zip with cityscapesScripts' "
    "csCreateTrainIdLabelImgs (the *_labelIds.png of the archive are another numbering)",
    zero_in_most=False,
    has_255=True,
    ignored_in_most=True,
)

dataset = dict(
    type="CityscapesDataset",
    data_prefix=dict(img_path="leftImg8bit/val", seg_map_path="gtFine/val"),
    ann_file="",
    img_suffix="_leftImg8bit.png",
    seg_map_suffix="_gtFine_labelTrainIds.png",
    reduce_zero_label=False,
    ignore_index=255,
)

downloads = dict(
    val=["leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"],
)

synth = dict(
    home="",
    stems=[
        "frankfurt/frankfurt_{i:06d}_000294",
        "lindau/lindau_{i:06d}_000019",
        "munster/munster_{i:06d}_000019",
    ],
    short=448,
    long=896,
    portraits=False,
    label_mode="L",
    void="strip",
    things="any",
)
