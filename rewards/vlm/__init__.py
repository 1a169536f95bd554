"""Asking a vision-language model, here or by HTTP: chats, requests, caches, shared prefixes, yes-tokens, value heads.

From outside: `chat.Message`, `yes_token.YesNo`, `judging` (make_chat, templates), `parsing`.
"""
