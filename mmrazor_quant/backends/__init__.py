"""One folder a backend; its table says where and how it takes quantized tensors."""

from .academic.rules import RULES as ACADEMIC
from .ncnn.rules import RULES as NCNN
from .onnxruntime.rules import RULES as ONNXRUNTIME
from .onnxruntime_dynamic.rules import RULES as ONNXRUNTIME_DYNAMIC
from .openvino.rules import RULES as OPENVINO
from .rules import Rules
from .snpe.rules import RULES as SNPE
from .tensorrt.rules import RULES as TENSORRT

BACKENDS = {rules.name: rules for rules in (ACADEMIC, ONNXRUNTIME, ONNXRUNTIME_DYNAMIC, OPENVINO, NCNN, SNPE, TENSORRT)}

__all__ = ['BACKENDS', 'Rules']
