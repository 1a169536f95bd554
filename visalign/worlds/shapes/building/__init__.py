"""How the shapes world's models were trained; `visalign world build` makes them anew. From outside: `build.build`."""
