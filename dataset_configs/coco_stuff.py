"""COCO-Stuff164k, val2017: 80 thing and 91 stuff classes."""

benchmark = dict(
    title="COCO-Stuff 164k, 171 classes",
    version=1,
    order=6,
    group="eight",
    num_classes=171,
    has_background=False,
    expected_images=5000,
    homes=["", "coco_stuff164k", "coco_stuff", "coco"],
    labels_from="*_labelTrainIds.png are made from stuffthingmaps_trainval2017.zip with mmsegmentation's "
    "tools/dataset_converters/coco_stuff164k.py (ids 0..181 with gaps become 0..170, 255 = unlabelled)",
    zero_in_most=False,
    has_255=True,
    ignored_in_most=True,
    # Ids that no label map has before the conversion: a copy in which none of them occurs may be unconverted.
    raw_gaps=[11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90],
)

dataset = dict(
    type="COCOStuffDataset",
    data_prefix=dict(img_path="images/val2017", seg_map_path="annotations/val2017"),
    ann_file="",
    img_suffix=".jpg",
    seg_map_suffix="_labelTrainIds.png",
    reduce_zero_label=False,
    ignore_index=255,
)

train = dict(
    data_prefix=dict(img_path="images/train2017", seg_map_path="annotations/train2017"),
    ann_file="",
    expected_images=118287,
    stems=["{i:012d}"],
)

downloads = dict(
    val=["val2017.zip", "stuffthingmaps_trainval2017.zip"],
    train=["train2017.zip", "stuffthingmaps_trainval2017.zip"],
)

synth = dict(
    home="",
    stems=["{i:012d}"],
    short=448,
    long=592,
    portraits=True,
    label_mode="L",
    void="patch",
    things="any",
)
