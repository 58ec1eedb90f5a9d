"""The embedded model's name in adapters: the same on every machine."""

from __future__ import annotations

import json

from transformers import AutoModelForCausalLM

import lorica
from lorica import embedded
from lorica.cli import main


def test_an_adapter_names_the_embedded_model_so_that_every_machine_finds_it(tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(embedded.base_path())
    adapters = lorica.attach(model, r=2, verbose=False)
    next(t for t in adapters.trained() if t.role == "B").parameter.data.add_(0.1)
    out = lorica.save(adapters, tmp_path / "a")
    assert lorica.formats.inspect(out)["base"]["name"] == "lorica:base"
    peft = json.loads((out / "adapter_config.json").read_text())
    assert peft["base_model_name_or_path"] == "lorica:base"
    ask = ["generate", "--adapter", str(out), "--prompt", "copy: a\n", "--max-new-tokens", "2"]
    assert main(ask) == 0
    answer = capsys.readouterr().out
    assert main([*ask, "--model", "lorica:base"]) == 0
    assert capsys.readouterr().out == answer
    # An older adapter has the path that the model had where it was trained.
    told = json.loads((out / "lorica.json").read_text())
    told["base"]["name"] = "/home/else/site-packages/lorica/embedded/base"
    (out / "lorica.json").write_text(json.dumps(told))
    assert main(ask) == 0 and capsys.readouterr().out == answer
    assert main(["merge", "--adapter", str(out), "--output-dir", str(tmp_path / "m")]) == 0
