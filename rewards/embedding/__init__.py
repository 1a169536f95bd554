"""Rewards that compare embeddings or regress on them: CLIP and its heirs, DINO, BLIP. From outside: by reward name;
`encoder.ClipEncoder` and `frozen` serve those who write one of their own."""
