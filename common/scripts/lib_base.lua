-- Base of every script. KEYS[1] is {<shard>}:meta; a script touches keys of that hash tag only. Time is the server's.
local call = redis.call
local P = string.sub(KEYS[1], 1, -5) -- "{<shard>}:"
local CLASSES = 3 -- priority classes, 0 is served first
local MAX_BELL = 8

local function now_ms()
  local t = call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- Integers are written in full: Lua's default of 14 digits would round sums of times and counters.
local function int(x)
  return string.format('%.0f', x)
end

-- Other programs may write keys and fields in another way: refuse to mix. The first program of a shard sets the version.
local function check_schema()
  local stored = call('HGET', KEYS[1], 'schema')
  if not stored then
    call('HSET', KEYS[1], 'schema', SCHEMA)
  elseif stored ~= SCHEMA then
    return redis.error_reply('SCHEMA stored ' .. stored .. ', spoken ' .. SCHEMA)
  end
end
