// The gateway's API: the model's name, and answers as they come.

function headers(key) {
  const found = { "Content-Type": "application/json" };
  if (key) found.Authorization = `Bearer ${key}`;
  return found;
}

async function failure(response) {
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message ?? message;
  } catch {
    // no JSON: a proxy between, say
  }
  const error = new Error(message);
  error.status = response.status;
  return error;
}

export async function model(key) {
  const response = await fetch("v1/models", { headers: headers(key) });
  if (!response.ok) throw await failure(response);
  return (await response.json()).data[0];
}

// Calls `on(chunk)` for each chunk. Ends when the answer does; throws what went wrong.
export async function answer(messages, settings, signal, on) {
  const body = {
    messages,
    stream: true,
    stream_options: { include_usage: true },
    temperature: settings.temperature,
    top_p: settings.top_p,
    max_tokens: settings.max_tokens,
    seed: settings.seed,
  };
  const asked = { method: "POST", headers: headers(settings.key), body: JSON.stringify(body), signal };
  const response = await fetch("v1/chat/completions", asked);
  if (!response.ok) throw await failure(response);
  let held = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection was closed before the answer's end");
    const events = (held + value).split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      on(chunk);
    }
  }
}
