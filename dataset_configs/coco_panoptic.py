"""COCO panoptic segmentation, val2017: 80 thing and 53 stuff classes."""

benchmark = dict(
    title="COCO panoptic, 133 classes",
    version=1,
    order=13,
    group="panoptic",
    num_classes=133,
    has_background=False,
    expected_images=5000,
    homes=["", "coco_panoptic", "coco"],
    labels_from="panoptic_val2017.json and the PNGs of panoptic_val2017.zip, which lies inside "
    "panoptic_annotations_trainval2017.zip: unpack both below annotations/",
    zero_in_most=False,
    has_255=True,
)

dataset = dict(
    type="PanopticDataset",
    data_prefix=dict(img_path="val2017", seg_map_path="annotations/panoptic_val2017"),
    ann_file="",
    panoptic_file="annotations/panoptic_val2017.json",
    img_suffix=".jpg",
    seg_map_suffix=".png",
    reduce_zero_label=False,
    ignore_index=255,
)

panoptic = dict(
    # the ids of the json file in label order: things, then stuff
    category_ids="1-11, 13-25, 27-28, 31-44, 46-65, 67, 70, 72-82, 84-90, 92-93, 95, 100, 107, 109, 112, 118-119, "
    "122, 125, 128, 130, 133, 138, 141, 144-145, 147-149, 151, 154-156, 159, 161, 166, 168, 171, "
    "175-178, 180-181, 184-200",
    things="0-79",
    exact_areas=True,
)

train = dict(
    data_prefix=dict(img_path="train2017", seg_map_path="annotations/panoptic_train2017"),
    ann_file="",
    panoptic_file="annotations/panoptic_train2017.json",
    expected_images=118287,
    stems=["{i:012d}"],
)

synth = dict(
    home="",
    stems=["{i:012d}"],
    short=448,
    long=592,
    portraits=True,
    label_mode="RGB",
    void="patch",
    things="any",
)
