"""COCO-Stuff 10k v1.1: 9000 training and 1000 test images, 80 thing and 91 stuff classes."""

benchmark = dict(
    title="COCO-Stuff 10k, 171 classes",
    version=1,
    order=9,
    group="closed-set",
    num_classes=171,
    has_background=False,
    expected_images=1000,
    homes=["", "coco_stuff10k"],
    labels_from="*_labelTrainIds.png are made from cocostuff-10k-v1.1.zip with mmsegmentation's "
    "tools/dataset_converters/coco_stuff10k.py (ids 0..182 with gaps become 0..171, 0 = unlabelled)",
    zero_in_most=False,
    has_255=False,
    # Ids that no annotation has before the conversion: a copy in which none of them occurs may be unconverted.
    raw_gaps=[12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91],
)

dataset = dict(
    type="COCOStuffDataset",
    data_prefix=dict(img_path="images/test2014", seg_map_path="annotations/test2014"),
    ann_file="",
    img_suffix=".jpg",
    seg_map_suffix="_labelTrainIds.png",
    reduce_zero_label=True,
    ignore_index=255,
)

train = dict(
    data_prefix=dict(img_path="images/train2014", seg_map_path="annotations/train2014"),
    ann_file="",
    expected_images=9000,
    stems=["COCO_train2014_{i:012d}"],
)

downloads = dict(
    val=["cocostuff-10k-v1.1.zip"],
    train=["cocostuff-10k-v1.1.zip"],
)

synth = dict(
    home="",
    # The test images are from COCO's train2014 as well.
    stems=["COCO_train2014_{i:012d}"],
    short=448,
    long=592,
    portraits=True,
    label_mode="L",
    void="patch",
    things="any",
)
