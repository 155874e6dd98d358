"""A server with the routes of vLLM's that the driver calls, over a small transformers model, with faults.

Run as a program it takes the arguments of `vllm.entrypoints.openai.api_server` that it needs.
"""

import base64
import hashlib
import io
import itertools
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

VERSION = "0.99.0"


class FakeServer:
    """A server in threads of this process.

    `fault` names what goes wrong from now on:
    `die` (connections are cut in the middle), `hang` (no route answers), `silent` (only /health does),
    `stuck` (a transfer does not end; all else works),
    `error` (500 for rollouts), `half` (a transfer leaves out the last half of the tensors), `stale` (it
    leaves out all of them), `restarted` (the version is forgotten), `mixed` (rollouts say another version),
    `short` (a log-prob is missing), `late` (a completion goes on behind its end).
    """

    def __init__(self, model: torch.nn.Module, tokenizer: Any, port: int = 0, **says: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.fault: str | None = None
        self.version = "default"
        self.adapters: dict[str, torch.nn.Module] = {}
        self.calls: list[tuple[str, Any]] = []
        self.says = {
            "device": "cpu",
            "logprobs_mode": "raw_logprobs",
            "lora": True,
            "dev": True,
            "scale_out": True,
            "own_head": True,
            "v2": True,
        } | says
        self.lock = threading.Lock()
        self.free = threading.Event()  # ends what hangs
        handler = type("Bound", (Handler,), {"fake": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.free.set()
        self.http.shutdown()
        self.http.server_close()

    def asked(self, path: str) -> list[Any]:
        """The bodies that a route got."""
        return [body for called, body in self.calls if called == path]


class Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        self._answer(json.loads(self.rfile.read(size)) if size else None)

    def _answer(self, body: Any) -> None:
        fake, path = self.fake, urlsplit(self.path).path
        fake.calls.append((path, body))
        if fake.fault == "hang" or (fake.fault == "silent" and path != "/health"):
            fake.free.wait()
            return
        try:
            found = ROUTES[path](self, body)
        except KeyError:
            found = (404, {"detail": "Not Found"})
        if found is not None:
            self._send(*found) if isinstance(found, tuple) else self._send(200, found)

    def _send(self, status: int, body: Any) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        if not isinstance(body, str):  # a sentence has no type, as vLLM sends it
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def health(self, body: Any) -> Any:
        return {}

    def show_version(self, body: Any) -> Any:
        return {"version": VERSION}

    def models(self, body: Any) -> Any:
        known = [{"id": "served", "parent": None, "max_model_len": 64}]
        return {"data": known + [{"id": name, "parent": "served"} for name in self.fake.adapters]}

    def server_info(self, body: Any) -> Any:
        says = self.fake.says
        if not says["dev"]:
            return 404, {"detail": "Not Found"}
        model = {
            "dtype": str(next(self.fake.model.parameters()).dtype),
            "logprobs_mode": says["logprobs_mode"],
            "max_logprobs": -1,
        }
        return {
            "vllm_config": {
                "model_config": model,
                "device_config": {"device": says["device"]},
                "lora_config": {} if not says["lora"] else {"max_loras": 2},
                "weight_transfer_config": None,
            }
        }

    def detokenize(self, body: Any) -> Any:
        return {"prompt": self.fake.tokenizer.decode(body["tokens"])}

    def weight_info(self, body: Any) -> Any:
        return {"weight_version": "default" if self.fake.fault == "restarted" else self.fake.version}

    def update_weight_version(self, body: Any) -> Any:
        self.fake.version = body["new_version"]
        return {"success": True}

    def reset_prefix_cache(self, body: Any) -> Any:
        return {"success": True}

    def collective_rpc(self, body: Any) -> Any:
        assert body["method"] == "reload_weights"
        files = sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors"))
        weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
        if self.fake.fault == "stuck":
            self.fake.free.wait()
        if self.fake.fault == "half":
            weights = dict(list(weights.items())[: len(weights) // 2])
        if self.fake.fault != "stale":
            with self.fake.lock:
                self.fake.model.load_state_dict(weights, strict=False)
        return {"results": [None]}

    def weight_checker(self, body: Any) -> Any:
        named = {k: v for k, v in self.fake.model.state_dict().items() if "q_proj" not in k}  # fused in vLLM
        if not self.fake.says["own_head"]:
            named.pop("lm_head.weight")
        digests = {
            f"dp0:pp0:pcp0:tp0:{name}": hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy())
            for name, tensor in named.items()
        }
        return {"checksums": {name: digest.hexdigest() for name, digest in digests.items()}}

    def load_lora_adapter(self, body: Any) -> Any:
        if body["lora_name"] in self.fake.adapters:
            return 400, {"message": "already loaded"}
        base = type(self.fake.model)(self.fake.model.config)
        base.load_state_dict(self.fake.model.state_dict())
        self.fake.adapters[body["lora_name"]] = PeftModel.from_pretrained(base, body["lora_path"]).eval()
        return f"Success: LoRA adapter '{body['lora_name']}' added successfully."

    def unload_lora_adapter(self, body: Any) -> Any:
        if self.fake.adapters.pop(body["lora_name"], None) is None:
            return 404, {"message": "not found"}
        return f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    def generate(self, body: Any) -> Any:
        fake, settings = self.fake, body["sampling_params"]
        if not fake.says["scale_out"]:
            return 403, {"message": "Scale-out endpoints are disabled."}
        if fake.fault == "error":
            return 500, {"error": {"message": "EngineCore encountered an issue.", "code": 500}}
        name = body.get("model") or "served"
        if name not in {"served", *fake.adapters}:
            return 404, {"error": {"message": f"The model `{name}` does not exist."}}
        if "prompt_logprob_token_ids" in settings and not fake.says["v2"]:
            return 400, {"error": {"message": "prompt_logprob_token_ids requires the V2 model runner"}}
        with fake.lock, torch.no_grad():
            choice, said = self._write(fake.adapters.get(name, fake.model), body["token_ids"], settings)
        if fake.fault == "mixed":
            choice["weight_versions"][0]["version"] = "other"
        if fake.fault == "short":
            choice["logprobs"]["content"].pop()
        if fake.fault == "late":
            choice["token_ids"].append(choice["token_ids"][-1])
        if not body.get("stream"):
            return {"choices": [choice], **said}
        self._stream(choice)
        return None

    def _stream(self, choice: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        content, tokens = choice["logprobs"]["content"], choice["token_ids"]
        first = {**choice, "token_ids": tokens[:1], "logprobs": {"content": content[:1]}}
        first |= {"finish_reason": None, "weight_versions": None}
        rest = {**choice, "token_ids": tokens[1:], "logprobs": {"content": content[1:]}}
        self.close_connection = True
        for event in (first, rest):
            self.wfile.write(f"data: {json.dumps({'choices': [event]})}\n\n".encode())
            self.wfile.flush()
            if self.fake.fault == "die":
                return
        self.wfile.write(b"data: [DONE]\n\n")

    def _write(self, model: Any, prompt: list[int], settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tokens, content = list(prompt), []
        reason = "length"
        generator = torch.Generator().manual_seed(settings.get("seed", 0))
        for _ in range(settings.get("max_tokens", 16)):
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1].float()
            temperature = settings.get("temperature", 1.0)
            if temperature:
                token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
            else:
                token = int(logits.argmax())
            tokens.append(token)
            content.append({"token_id": token, "logprob": float(logits.log_softmax(-1)[token])})
            if token in settings.get("stop_token_ids", []):
                reason = "stop"
                break
        written = tokens[len(prompt) :]
        choice = {
            "token_ids": written,
            "logprobs": {"content": content},
            "finish_reason": reason,
            "weight_versions": [{"version": self.fake.version, "start": 0, "end": len(written)}],
        }
        return choice, self._scores(model, prompt, settings)

    def _scores(self, model: Any, prompt: list[int], settings: dict[str, Any]) -> dict[str, Any]:
        log_p = model(input_ids=torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        if settings.get("prompt_logprobs") == -1:
            rows = [{str(v): {"logprob": float(x)} for v, x in enumerate(row)} for row in log_p[:-1]]
            return {"prompt_logprobs": [None, *rows]}
        if "prompt_logprob_token_ids" in settings:
            ids = torch.tensor(settings["prompt_logprob_token_ids"])
            start = settings["prompt_logprob_start"]
            assert len(ids) == len(prompt) - 1 - start
            buffer = io.BytesIO()
            np.save(buffer, log_p[start:-1].gather(-1, ids).numpy(), allow_pickle=False)
            return {"prompt_token_id_logprobs": base64.b64encode(buffer.getvalue()).decode()}
        return {}


ROUTES = {
    "/health": Handler.health,
    "/version": Handler.show_version,
    "/v1/models": Handler.models,
    "/server_info": Handler.server_info,
    "/detokenize": Handler.detokenize,
    "/weight_info": Handler.weight_info,
    "/update_weight_version": Handler.update_weight_version,
    "/reset_prefix_cache": Handler.reset_prefix_cache,
    "/collective_rpc": Handler.collective_rpc,
    "/weight_checker": Handler.weight_checker,
    "/v1/load_lora_adapter": Handler.load_lora_adapter,
    "/v1/unload_lora_adapter": Handler.unload_lora_adapter,
    "/inference/v1/generate": Handler.generate,
}


def main(arguments: list[str]) -> None:
    """Serve until killed."""
    given = dict(itertools.pairwise(arguments))
    model = AutoModelForCausalLM.from_pretrained(given["--model"])
    server = FakeServer(model, AutoTokenizer.from_pretrained(given["--model"]), int(given["--port"]))
    print(f"serving at {server.url}", flush=True)
    while True:
        time.sleep(1)


if __name__ == "__main__":
    main(sys.argv[1:])
