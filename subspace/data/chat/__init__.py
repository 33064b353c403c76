"""From a row of people's own data to token ids, with a mark for each token that carries loss."""
