"""Save a resized model as the Hub has it, and open it again; with a repository's name, push it there.

python push.py                      # to a folder, without network
python push.py me/levit-128s-160    # to the Hub
"""

import json
import sys
from pathlib import Path

import timm
import torch

import timm_resize

torch.manual_seed(0)
model = timm.create_model("levit_128s", num_classes=10).eval()
timm_resize.resize_(model, (160, 192))

if len(sys.argv) > 1:
    print(timm_resize.push_to_hub(model, sys.argv[1]))
else:
    folder = Path("levit-128s-160x192")
    timm_resize.save_pretrained(model, folder)
    print(sorted(path.name for path in folder.iterdir()))
    print("preprocessing:", json.loads((folder / "config.json").read_text())["pretrained_cfg"]["input_size"])
    again = timm_resize.create_model(f"local-dir:{folder}", pretrained=True).eval()
    image = torch.rand(1, 3, 160, 192)
    with torch.no_grad():
        assert torch.equal(again(image), model(image))
    print("opened again, the same at every bit")
