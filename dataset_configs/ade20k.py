"""ADE20K scene parsing (SceneParse150), validation split: 150 classes."""

benchmark = dict(
    title="ADE20K, 150 classes",
    version=1,
    order=8,
    group="eight",
    num_classes=150,
    has_background=False,
    expected_images=2000,
    homes=["", "ADEChallengeData2016", "ade/ADEChallengeData2016", "ade20k/ADEChallengeData2016"],
    labels_from="annotations/validation comes with ADEChallengeData2016.zip: 0 = unlabelled, 1..150 = classes",
    zero_in_most=True,
    has_255=False,
)

dataset = dict(
    type="ADE20KDataset",
    data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
    ann_file="",
    img_suffix=".jpg",
    seg_map_suffix=".png",
    reduce_zero_label=True,
    ignore_index=255,
)

train = dict(
    data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
    ann_file="",
    expected_images=20210,
    stems=["ADE_train_{i:08d}"],
)

downloads = dict(
    val=["ADEChallengeData2016.zip"],
    train=["ADEChallengeData2016.zip"],
)

synth = dict(
    home="ADEChallengeData2016",
    stems=["ADE_val_{i:08d}"],
    short=336,
    long=448,
    portraits=True,
    label_mode="L",
    void="patch",
    things="any",
)
