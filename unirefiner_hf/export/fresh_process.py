"""Encode pixels with a checkpoint, as its user would: in a process of its own.

    python fresh_process.py FOLDER PIXELS TOKENS package|remote [FINAL_NORM]

``package`` loads with this package imported; ``remote`` hides the package and trusts the
code beside the weights. A bare backbone is put into a border of width 0.
"""

import sys


def main(folder: str, pixels: str, output: str, code: str, final_norm: str) -> None:
    if code == "remote":
        sys.modules["unirefiner_hf"] = None  # type: ignore[assignment]
    else:
        import unirefiner_hf  # noqa: F401
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel

    model = AutoModel.from_pretrained(
        folder, trust_remote_code=code == "remote", dtype=torch.float32
    )
    if model.config.model_type != "unirefiner":
        from unirefiner_hf import UniRefinerModel

        model = UniRefinerModel.from_tower(
            model, register_width=0, final_norm=final_norm == "True"
        )
    with torch.no_grad():
        tokens = model.eval()(load_file(pixels)["pixels"]).last_hidden_state
    save_file({"tokens": tokens.contiguous()}, output)


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder: its neighbours are no top-level modules
    main(*sys.argv[1:])
