
def score(reward_inputs):
    return [{"overall": len(item["response"]) % 3 / 2, "accuracy": float(item["response_length"] % 2)}
            for item in reward_inputs]
