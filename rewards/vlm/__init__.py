"""Asking a vision-language model, here or by HTTP: chats, requests, caches, shared prefixes, yes-tokens, value heads.

From outside: `chat` (Message, make_chat), `yes_token.YesNo`, `judging`, `parsing`.
"""
