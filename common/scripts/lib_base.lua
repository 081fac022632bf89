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

-- Other programs may write keys and fields in another way: every script refuses to mix, before it changes anything.
local marks = call('HMGET', KEYS[1], 'schema', unpack(MARKS)) -- those that the script names, as they were before
local stored_schema = table.remove(marks, 1)
if stored_schema and stored_schema ~= SCHEMA then
  return redis.error_reply('SCHEMA stored ' .. stored_schema .. ', spoken ' .. SCHEMA)
end

-- The first program of a shard sets the version; one that only asks for something does not make the shard.
local function set_schema()
  if not stored_schema then call('HSET', KEYS[1], 'schema', SCHEMA) end
end

-- Leases count for nothing for a while when the server was down or stopped, or its clock has moved: those who hold
-- them could not renew them, and get one lease of time to do so. `mark` is a field of the shard's meta key: the last call.
-- Returns the time by which a lease must have ended to count: that of a holder who gave it up (0) always does.
local LONG_PAUSE_MS = 3000 -- longer than a busy machine delays what is due each second
local function ended_by(mark, grace_mark, now, lease)
  local marks = call('HMGET', KEYS[1], mark, grace_mark)
  local grace = tonumber(marks[2] or 0)
  if math.abs(now - (marks[1] or 0)) > math.max(lease / 2, LONG_PAUSE_MS) or grace > now + lease then
    grace = now + lease
    call('HSET', KEYS[1], grace_mark, int(grace))
  end
  call('HSET', KEYS[1], mark, int(now))
  return now < grace and 0 or now
end

-- Leases from before the clock went back: their holders may be gone, and would be missed only when it is that late again.
local function shorten_leases(key, now, lease, most)
  for _, holder in ipairs(call('ZRANGEBYSCORE', key, int(now + 2 * lease), '+inf', 'LIMIT', 0, most)) do
    call('ZADD', key, int(now + lease), holder)
  end
end
