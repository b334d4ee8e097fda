// The page's words. English stands where it is shown; WORDS, which the server puts in front, has another language's.

// What the language says for an English sentence, with {0}, {1}, … filled in.
function said(sentence, ...values) {
  return (WORDS[sentence] ?? sentence).replace(/\{(\d+)\}/g, (_, i) => values[i]);
}

// t`Saved at step ${step}` looks up "Saved at step {0}".
const t = (parts, ...values) => said(parts.reduce((whole, part, i) => `${whole}{${i - 1}}${part}`), ...values);

const counted = (count, noun, several = `${noun}s`) => said(`{0} ${count === 1 ? noun : several}`, count);

// What the server says of a value, as a sentence.
const sentence = (words) => (/[.!?…]$/.test(words) ? words : `${words}.`);

// A parameter's or a tool's row with its words in the page's language.
function translated(row) {
  const words = ["label", "help", "allowed", "summary", "group"].filter((name) => row[name]);
  return { ...row, ...Object.fromEntries(words.map((name) => [name, said(row[name])])) };
}
