// Calls the gateway with grpc-js in the way that the first argument names; prints one line of JSON about how it went.
const grpc = require('@grpc/grpc-js');
const { loadSync } = require('@grpc/proto-loader');

const { TORCHRELAY_PROTOS, TORCHRELAY_ADDRESS, TORCHRELAY_API_KEY, TORCHRELAY_MODEL } = process.env;
const definition = loadSync('torchrelay/v1/generation.proto', { includeDirs: [TORCHRELAY_PROTOS], enums: String });
const { GenerationService } = grpc.loadPackageDefinition(definition).torchrelay.v1;
const client = new GenerationService(TORCHRELAY_ADDRESS, grpc.credentials.createInsecure());
const metadata = new grpc.Metadata();
metadata.set('authorization', `Bearer ${TORCHRELAY_API_KEY}`);

function report(result) {
  console.log(JSON.stringify(result));
  client.close();
}

// Streams more than can be read in time; `onText` is called with every piece of text.
function stream(options, onText) {
  const input = { text: '1, 2, 3, 4, 5, 6,' };
  const call = client.StreamGenerate({ model: TORCHRELAY_MODEL, input, config: { maxTokens: 1000 } }, metadata, options);
  let generationId;
  call.on('data', ({ event }) => {
    generationId ??= event.accepted.generationId;
    if (event.deltas) onText(call);
  });
  call.on('error', ({ code }) => report({ generationId, code }));
}

const calls = {
  generate() {
    const input = { chat: { messages: [{ role: 'ROLE_USER', parts: [{ text: 'What is the capital of France?' }] }] } };
    client.Generate({ model: TORCHRELAY_MODEL, input, config: { maxTokens: 16 } }, metadata, (error, response) => {
      if (error) throw error;
      report(response.generation);
    });
  },
  deadline: () => stream({ deadline: Date.now() + 2500 }, () => {}),
  cancel: () => stream({}, (call) => call.cancel()),
};
calls[process.argv[2]]();
