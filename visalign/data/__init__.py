"""What comes from files: prompt sets with what they know of their prompts, pictures with captions, people's votes.

From outside: `prompts` (sets, the sampler of groups), `prompt_context`, `pictures`, `votes`.
"""
