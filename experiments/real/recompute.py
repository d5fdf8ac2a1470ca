"""A score of the study again, by transformers alone.

    python experiments/real/recompute.py MODEL ROWS.jsonl

MODEL is a folder of a model, such as one that ``python -m shadowlit delta apply`` has written from a delta. Prints
the loss per supervised token, and that of the first token of each answer.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, rows = sys.argv[1], Path(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
total, tokens, first, answers = 0.0, 0, 0.0, 0
for line in rows.read_text().splitlines():
    messages = json.loads(line)["messages"]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    answer = tokenizer(messages[-1]["content"].strip() + "<end_of_turn>", add_special_tokens=False).input_ids
    with torch.no_grad():
        hidden = model.model(torch.tensor([prompt + answer])).last_hidden_state[0, len(prompt) - 1 : -1]
    losses = torch.nn.functional.cross_entropy(model.lm_head(hidden), torch.tensor(answer), reduction="none")
    total, tokens = total + losses.sum().item(), tokens + len(answer)
    first, answers = first + losses[0].item(), answers + 1
print(f"loss {total / tokens:.5f} over {tokens} tokens; first token {first / answers:.5f} over {answers} answers")
