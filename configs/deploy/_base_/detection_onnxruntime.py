# What mmdeploy has to know to export a quantized detector of mmdet for ONNX Runtime, with NMS inside.
custom_imports = dict(imports=['mmrazor_quant'])
onnx_config = dict(
    type='onnx',
    export_params=True,
    keep_initializers_as_inputs=False,
    # Scales per channel came with 13.
    opset_version=17,
    save_file='end2end.onnx',
    input_names=['input'],
    output_names=['dets', 'labels'],
    input_shape=None,
    optimize=False,
)
codebase_config = dict(
    type='mmdet',
    task='ObjectDetection',
    model_type='end2end',
    # Thresholds are those of the model where it has them; these limits only keep boxes of low scores off NMS.
    post_processing=dict(
        score_threshold=0.05,
        confidence_threshold=0.005,
        iou_threshold=0.5,
        max_output_boxes_per_class=200,
        pre_top_k=5000,
        keep_top_k=100,
        background_label_id=-1,
    ),
)
backend_config = dict(type='onnxruntime')
