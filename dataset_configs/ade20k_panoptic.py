"""ADE20K panoptic segmentation, validation split: 100 thing and 50 stuff classes."""

benchmark = dict(
    title="ADE20K panoptic, 150 classes",
    version=1,
    order=14,
    group="panoptic",
    num_classes=150,
    has_background=False,
    expected_images=2000,
    homes=["", "ADEChallengeData2016", "ade/ADEChallengeData2016", "ade20k/ADEChallengeData2016"],
    labels_from="ade20k_panoptic_val.json and its PNGs are made from ADEChallengeData2016 and annotations_instance.tar "
    "with Mask2Former's datasets/prepare_ade20k_pan_seg.py",
    zero_in_most=False,
    has_255=True,
)

dataset = dict(
    type="PanopticDataset",
    data_prefix=dict(img_path="images/validation", seg_map_path="ade20k_panoptic_val"),
    ann_file="",
    panoptic_file="ade20k_panoptic_val.json",
    img_suffix=".jpg",
    seg_map_suffix=".png",
    reduce_zero_label=False,
    ignore_index=255,
)

panoptic = dict(
    category_ids="0-149",
    things="7-8, 10, 12, 14-15, 18-20, 22-24, 27, 30-33, 35-39, 41-45, 47, 49-50, 53, 55-58, 62, 64-67, 69-76, "
    "78, 80-83, 85-90, 92-93, 95, 97-98, 102-104, 107-108, 110-112, 115-116, 118-121, 123-127, 129-130, "
    "132-139, 142-144, 146-149",
    # the preparation counts the area of stuff before it draws things over it
    exact_areas=False,
)

train = dict(
    data_prefix=dict(img_path="images/training", seg_map_path="ade20k_panoptic_train"),
    ann_file="",
    panoptic_file="ade20k_panoptic_train.json",
    expected_images=20210,
    stems=["ADE_train_{i:08d}"],
)

synth = dict(
    home="ADEChallengeData2016",
    stems=["ADE_val_{i:08d}"],
    short=336,
    long=448,
    portraits=True,
    label_mode="RGB",
    void="patch",
    things="any",
)
