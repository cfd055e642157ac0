import os

import torch

torch.set_num_threads(1)  # the models are tiny: threads would only wait for one another
if not torch.cuda.is_available():
    # Read when triton is imported, which transformers does where it is installed.
    os.environ["TRITON_INTERPRET"] = "1"
