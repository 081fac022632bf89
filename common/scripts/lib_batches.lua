-- Batches. KEYS[1] is {t:<tenant>}:b:<id>, the hash of one batch; all that belongs to a tenant's batches has its hash tag, so
-- that a batch is made, counted and listed by one script. Time is the server's, in ms. Fields of the hash:
--   st state: R running, X being cancelled, D done, C cancelled; de '1' once it is to be erased; total items
--   ok / er / ca results: responses, errors, cancelled; ru items in the queue, as its feeder said last
--   hw no item from here on has ever been fed; ep epoch, ho holder, le end of the lease of its feeder
--   cr made, dl deadline, en ended; rt retention; ik idempotency digest; pr priority class; ow whose it is; nm name, sealed;
--   sa salt of the idempotency keys of its items
-- Beside it, :items, a list, until the batch has ended; :results, a list in the order of their coming, each the item's index
-- (4 bytes, little endian) and what came of it; :done, a bit for each item that has a result.
local call = redis.call
local ID_LENGTH = 32
local B = KEYS[1]
local ID = string.sub(B, -ID_LENGTH)
local P = string.sub(B, 1, -ID_LENGTH - 3) -- "{t:<tenant>}:"
local FIELDS = {
  'st', 'de', 'total', 'ok', 'er', 'ca', 'ru', 'hw', 'ep', 'cr', 'dl', 'en', 'rt', 'pr', 'ow', 'nm', 'sa',
}

local function now_ms()
  local t = call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- Integers are written in full: Lua's default of 14 digits would round times.
local function int(x)
  return string.format('%.0f', x)
end

local function describe()
  return call('HMGET', B, unpack(FIELDS))
end

local function is_live(state)
  return state == 'R' or state == 'X'
end

local function erase()
  local ik = call('HGET', B, 'ik')
  if ik and ik ~= '' then call('DEL', P .. 'bi:' .. ik) end
  call('DEL', B, B .. ':items', B .. ':results', B .. ':done')
  call('ZREM', P .. 'batches', ID)
end
