"""UltraMNIST: sums of digits of very different sizes on large, noisy images, generated on demand.

Gupta et al., UltraMNIST Classification: A Benchmark to Train CNNs for Very Large Images (arXiv 2206.12681).
`layout` chooses the digits and their places, `background` draws the noise, `digits` loads images of digits,
and `image` combines them.
"""

from streamcnn.data.ultramnist.digits import Digits as Digits
from streamcnn.data.ultramnist.digits import DigitSet as DigitSet
from streamcnn.data.ultramnist.digits import load_digits as load_digits
from streamcnn.data.ultramnist.image import UltraMnistImage as UltraMnistImage
from streamcnn.data.ultramnist.image import make_image as make_image
from streamcnn.data.ultramnist.layout import NUM_CLASSES as NUM_CLASSES
from streamcnn.data.ultramnist.layout import SPLITS as SPLITS
from streamcnn.data.ultramnist.layout import Layout as Layout
from streamcnn.data.ultramnist.layout import PlacedDigit as PlacedDigit
from streamcnn.data.ultramnist.layout import Recipe as Recipe
from streamcnn.data.ultramnist.layout import Spec as Spec
from streamcnn.data.ultramnist.layout import label_of as label_of
from streamcnn.data.ultramnist.layout import make_layout as make_layout
